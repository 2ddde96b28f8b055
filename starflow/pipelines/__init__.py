"""Pipelines in the style of diffusers: text to image, and class-conditional or unconditional images."""

import contextlib
from collections.abc import Iterator

from ..errors import ConfigError

try:
    import diffusers
    import transformers
except ModuleNotFoundError as error:
    raise ConfigError(
        f"pipelines need {error.name}: pip install 'starflow-kernels[models]', on Python 3.11 or newer"
    ) from None

# diffusers looks for the base class beside FlowModel when it loads one.
from diffusers import ModelMixin  # noqa: F401

from .base import FlowPipeline, FlowPipelineOutput
from .model import FlowModel
from .pixels import TarFlowPipeline
from .text_to_image import STARFlowPipeline

__all__ = [
    "FlowModel",
    "FlowPipeline",
    "FlowPipelineOutput",
    "STARFlowPipeline",
    "TarFlowPipeline",
    "without_loading_bars",
]


@contextlib.contextmanager
def without_loading_bars() -> Iterator[None]:
    """Hide the progress bars that diffusers and transformers show while they load."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    shown = [logging for logging in libraries if logging.is_progress_bar_enabled()]
    for logging in shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        for logging in shown:
            logging.enable_progress_bar()
