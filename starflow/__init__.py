"""TarFlow and STARFlow models on starflow_kernels: training, sampling and evaluation."""

import importlib
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, ConfigError, DataError, InverseError, StarflowError

if TYPE_CHECKING:
    from starflow_kernels import __version__

    from .inversion.request import Inversion
    from .io.images import save_grid
    from .models.config import FlowConfig
    from .models.flow import Flow
    from .models.guidance import Guidance
    from .models.results import FlowInverse, FlowOutput, FlowSample
    from .models.token_config import TokenFlowConfig
    from .models.token_flow import TokenFlow
    from .opening import open_model
    from .pipelines import FlowModel, FlowPipeline, STARFlowPipeline, TarFlowPipeline
    from .sampling.sample import SampleOptions, SampleReport

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Flow",
    "FlowConfig",
    "FlowInverse",
    "FlowModel",
    "FlowOutput",
    "FlowPipeline",
    "FlowSample",
    "Guidance",
    "InverseError",
    "Inversion",
    "STARFlowPipeline",
    "SampleOptions",
    "SampleReport",
    "StarflowError",
    "TarFlowPipeline",
    "TokenFlow",
    "TokenFlowConfig",
    "__version__",
    "open_model",
    "save_grid",
]


# Modules are imported on first use, so that the command line can report a missing package in one line.
MODULES = {
    "starflow_kernels": ("__version__",),
    ".inversion.request": ("Inversion",),
    ".io.images": ("save_grid",),
    ".models.config": ("FlowConfig",),
    ".models.flow": ("Flow",),
    ".models.guidance": ("Guidance",),
    ".models.results": ("FlowInverse", "FlowOutput", "FlowSample"),
    ".models.token_config": ("TokenFlowConfig",),
    ".models.token_flow": ("TokenFlow",),
    ".opening": ("open_model",),
    ".pipelines": ("FlowModel", "FlowPipeline", "STARFlowPipeline", "TarFlowPipeline"),
    ".sampling.sample": ("SampleOptions", "SampleReport"),
}


def __getattr__(name: str) -> Any:
    for module, names in MODULES.items():
        if name in names:
            return getattr(importlib.import_module(module, __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
