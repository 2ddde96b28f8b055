"""Processes of torchrun that share the work of a run."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from ..errors import StarflowError

Result = TypeVar("Result")
# Longest time that the first process to finish waits for the last one.
PATIENCE = datetime.timedelta(days=7)


class Processes:
    """Rank of this process and number of processes; one process without torchrun."""

    def __init__(self):
        self.rank, self.local_rank, self.count = (
            int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
        )

    def first(self, action: Callable[[], Result]) -> Result:
        """Run an action on rank 0; every process gets the result, or raises its StarflowError."""
        if self.count == 1:
            return action()
        sent = None, None
        if self.rank == 0:
            try:
                sent = action(), None
            except StarflowError as error:
                sent = None, error
        box = [sent]
        self._together(lambda: dist.broadcast_object_list(box))
        result, error = box[0]
        if error is not None:
            raise error
        return result

    def gather(self, value: Result) -> list[Result]:
        """Wait for all processes; return the value of each, in the order of ranks."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        self._together(lambda: dist.all_gather_object(values, value))
        return values

    def _together(self, action: Callable[[], None]) -> None:
        try:
            if not dist.is_initialized():
                dist.init_process_group("gloo", timeout=PATIENCE)
            action()
        except RuntimeError as error:
            raise StarflowError("another process of this run has ended, see its message") from error
