"""Pipelines in the manner of diffusers: text to image, and class-conditional or unconditional images."""

from ..errors import ConfigError

try:
    import diffusers  # noqa: F401
    import transformers  # noqa: F401
except ModuleNotFoundError as error:
    raise ConfigError(
        f"pipelines need {error.name}: pip install starflow-kernels[models], on Python 3.11 or newer"
    ) from None

# diffusers looks for the base class beside FlowModel when it loads one.
from diffusers import ModelMixin  # noqa: F401

from .base import FlowPipeline, FlowPipelineOutput
from .model import FlowModel
from .pixels import TarFlowPipeline
from .text_to_image import STARFlowPipeline

__all__ = ["FlowModel", "FlowPipeline", "FlowPipelineOutput", "STARFlowPipeline", "TarFlowPipeline"]
