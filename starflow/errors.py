"""Errors that a user can correct. The command line prints them in one line and exits with status 2."""


class StarflowError(ValueError):
    """Base of the errors below."""


class ConfigError(StarflowError):
    """Setting that is unknown, missing or out of range."""


class CheckpointError(StarflowError):
    """Checkpoint that is missing, damaged, or does not fit its configuration."""


class DataError(StarflowError):
    """Data set that is missing, unreadable, or of the wrong size."""


class ImageError(DataError):
    """Image that cannot be read. Training takes another one in its place."""


class InverseError(StarflowError):
    """Noise that a flow cannot map to finite data. The message names the block, token and sample."""
