"""Pipelines in the manner of diffusers: text to image, and class-conditional or unconditional in pixels."""

from ..errors import ConfigError

try:
    import diffusers
    import transformers
except ModuleNotFoundError as error:
    raise ConfigError(
        f"pipelines need {error.name}: pip install starflow-kernels[models], on Python 3.11 or newer"
    ) from None

# diffusers looks for the base class beside FlowModel when it loads one.
from diffusers import ModelMixin  # noqa: F401

from ..inversion.solvers import METHODS
from .base import FlowPipeline, FlowPipelineOutput, PipelineReport
from .model import FlowModel
from .pixels import TarFlowPipeline
from .text_to_image import STARFlowPipeline


def hide_loading_bars() -> None:
    """Load components without the progress bars of diffusers and transformers."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


__all__ = [
    "METHODS",
    "FlowModel",
    "FlowPipeline",
    "FlowPipelineOutput",
    "PipelineReport",
    "STARFlowPipeline",
    "TarFlowPipeline",
    "hide_loading_bars",
]
