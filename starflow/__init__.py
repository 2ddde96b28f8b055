"""TarFlow and STARFlow models on starflow_kernels: train, sample, evaluate."""

from .errors import CheckpointError, ConfigError, DataError, InverseError, StarflowError
from .models.config import FlowConfig
from .models.flow import Flow, FlowOutput, Guidance

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Flow",
    "FlowConfig",
    "FlowOutput",
    "Guidance",
    "InverseError",
    "StarflowError",
]
