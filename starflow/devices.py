"""Checks of devices and dtypes."""

from __future__ import annotations

import torch

from starflow_kernels._core.checks import FLOATS

from .errors import ConfigError


def check_device(device: str | torch.device) -> None:
    """Check that torch can use a device.

    Args:
        device: device or its name, such as "cuda:1".

    Raises:
        ConfigError: there is no such device, or this torch cannot use it.
    """
    try:
        torch.empty(0, dtype=torch.float32, device=device)
    # The error depends on the kind of device. An unknown one may be looked up as a module of torch.
    except (AssertionError, ImportError, RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise ConfigError(f"device {device}: {reason}") from None


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise ConfigError unless weights can have the dtype; None keeps the one that they have."""
    if dtype is not None and dtype not in FLOATS:
        raise ConfigError(f"dtype={dtype!r}: expected one of {', '.join(map(str, FLOATS))}")
