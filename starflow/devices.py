"""Check of devices."""

from __future__ import annotations

import torch

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
