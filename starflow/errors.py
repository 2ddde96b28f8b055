"""Errors that a user can mend: the command line prints them as one line and exits with 2."""


class StarflowError(ValueError):
    """Base of the errors below."""


class ConfigError(StarflowError):
    """A setting that is unknown, missing or out of range."""


class CheckpointError(StarflowError):
    """A checkpoint that is missing, damaged, or does not fit its configuration."""


class DataError(StarflowError):
    """A data set that is missing, unreadable, or of the wrong size."""


class InverseError(StarflowError):
    """Noise that a flow cannot map to finite data; says which block, token and sample."""
