"""Processes of torchrun that share the work of one run."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from ..errors import StarflowError

Result = TypeVar("Result")
# The first to finish waits for the last, which may take long.
PATIENCE = datetime.timedelta(days=7)


class Processes:
    """This process among those that torchrun started: its rank, their count; one where torchrun did not start it."""

    def __init__(self):
        self.rank, self.local_rank, self.count = (
            int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
        )

    def first(self, action: Callable[[], Result]) -> Result:
        """Let rank 0 do something; all get the result, or its StarflowError."""
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
        """The value of each process, in the order of ranks. Waits for all."""
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
