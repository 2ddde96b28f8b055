"""TarFlow and STARFlow models on starflow_kernels: train, sample, evaluate."""

from typing import Any

from starflow_kernels import __version__

from .errors import CheckpointError, ConfigError, DataError, InverseError, StarflowError
from .inversion.request import Inversion
from .io.images import save_grid
from .models.config import FlowConfig
from .models.flow import Flow, FlowOutput
from .models.guidance import Guidance
from .open_model import open_model
from .sampling.sample import SampleOptions, SampleReport

# They need diffusers and transformers, which are imported on first use.
PIPELINES = ("FlowModel", "FlowPipeline", "STARFlowPipeline", "TarFlowPipeline")

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Flow",
    "FlowConfig",
    "FlowModel",
    "FlowOutput",
    "FlowPipeline",
    "Guidance",
    "InverseError",
    "Inversion",
    "STARFlowPipeline",
    "SampleOptions",
    "SampleReport",
    "StarflowError",
    "TarFlowPipeline",
    "__version__",
    "open_model",
    "save_grid",
]


def __getattr__(name: str) -> Any:
    if name in PIPELINES:
        from . import pipelines

        return getattr(pipelines, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
