"""Wall time of work on a device."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch


def device_time(device: torch.device) -> float:
    """Wait for the device and return the time in seconds."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


class Clock:
    """Seconds per stage of a run.

    Args:
        device: the device, which is waited for at both ends of a stage.
        stages: names of the stages, in the order of `seconds`.
    """

    def __init__(self, device: torch.device, stages: tuple[str, ...]):
        self.device = device
        self.seconds = dict.fromkeys(stages, 0.0)

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time inside the context to a stage."""
        start = device_time(self.device)
        yield
        self.seconds[stage] += device_time(self.device) - start
