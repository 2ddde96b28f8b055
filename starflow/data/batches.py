"""Batches of a data set for training, in an order that the seed determines."""

from __future__ import annotations

import dataclasses
import multiprocessing
import signal
import sys
import warnings
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Sampler

from ..seeds import generator, permutation

if TYPE_CHECKING:
    from .datasets import ImageSet
    from .latents import LatentSet

# Start of torch's warning of more workers than CPU cores.
MANY_WORKERS = "This DataLoader will create"


@dataclasses.dataclass(frozen=True)
class ShuffledBatches(Sampler):
    """Indices of the batches of the steps first .. last - 1, drawn without replacement within an epoch.

    A batch depends only on the seed and its step. Images at the end of an epoch that do not fill a batch are left out.

    Args:
        count: images in the data set.
        batch_size: images per batch.
        seed: seed of the order.
        first: first step.
        last: step after the last one.
        rows: rows of each batch to take; None takes all.
    """

    count: int
    batch_size: int
    seed: int
    first: int
    last: int
    rows: slice | None = None

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[int]]:
        size = min(self.batch_size, self.count)
        for step in range(self.first, self.last):
            epoch, position = divmod(step, self.count // size)
            if position == 0 or step == self.first:
                order = permutation(self.count, generator(self.seed, epoch, 0))
            yield order[position * size : (position + 1) * size][self.rows or slice(None)]


def batches(images: ImageSet | LatentSet, speaks: bool = True, **options: Any) -> Iterator[list[torch.Tensor]]:
    """Iterate over the batches of a DataLoader, on the CPU whatever the default device of torch.

    Args:
        images: the data set.
        speaks: whether to warn of more workers than CPU cores.
        options: options of the DataLoader.
    """
    with torch.device("cpu"), warnings.catch_warnings():
        if not speaks:
            warnings.filterwarnings("ignore", MANY_WORKERS)
        loader = DataLoader(images, worker_init_fn=_leave_ends_to_the_trainer, **options)
        # The iterator of torch warns as the loader did.
        warnings.filterwarnings("ignore", MANY_WORKERS)
        loaded = iter(loader)
    while True:
        with torch.device("cpu"):
            batch = next(loaded, None)
        if batch is None:
            return
        yield batch


def _leave_ends_to_the_trainer(worker: int) -> None:
    """Ignore Ctrl-C and SIGTERM, which may be sent to all processes: the process that trains ends its workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _report_unless_disconnected


def _report_unless_disconnected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an error, but not that the process that trains stopped while a worker handed it a batch."""
    if not issubclass(kind, (ConnectionError, EOFError, multiprocessing.AuthenticationError)):
        sys.__excepthook__(kind, error, trace)
