"""Reading of training data: random variants of images, another image in place of one that cannot be read, workers."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset, Sampler, default_collate

from ..errors import DataError, ImageError
from ..seeds import generator
from .batches import ShuffledBatches, batches

if TYPE_CHECKING:
    from .datasets import ImageSet
    from .latents import LatentSet

# Third part of the key of random numbers, after those of the order (0) and of a training step (1).
VARIANTS = 2
# Batches that a worker reads ahead for a GPU.
PREFETCH = 4
# Indices of images that could not be read -> reasons.
Broken = dict[int, str]


@dataclasses.dataclass(frozen=True)
class Reader(Dataset):
    """Rows of a data set by step and index, read in the process of a worker.

    Args:
        images: the data set.
        seed: seed of the random variants of images.
    """

    images: ImageSet | LatentSet
    seed: int = 0

    def __getitem__(self, key: tuple[int, int]) -> tuple[tuple[torch.Tensor, ...], Broken]:
        """Return a row, and the images before it that cannot be read.

        Args:
            key: step and index. An image that cannot be read is replaced by the next one in the order of the indices.

        Raises:
            DataError: no image can be read.
        """
        (step, first), count, broken = key, len(self.images), {}
        for index in (*range(first, count), *range(first)):
            try:
                return self._row(step, index), broken
            except ImageError as error:
                broken[index] = str(error)
        raise DataError(f"none of the {count} images can be read, such as {broken[first]}")

    def _row(self, step: int, index: int) -> tuple[torch.Tensor, ...]:
        if vary := getattr(self.images, "vary", None):
            return vary(index, generator(self.seed, step, VARIANTS, index)), self.images.labels[index]
        return self.images[index]


@dataclasses.dataclass(frozen=True)
class _Keys(Sampler):
    """Batches of (step, index) pairs."""

    order: ShuffledBatches

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step, indices in enumerate(self.order, self.order.first):
            yield [(step, index) for index in indices]


def training_batches(
    images: ImageSet | LatentSet,
    order: ShuffledBatches,
    workers: int,
    device: str,
    broken: Broken,
    speaks: bool = True,
) -> Generator[list[torch.Tensor], None, None]:
    """Iterate over training batches. A warning names each image that cannot be read.

    Args:
        images: the data set.
        order: indices of each batch. Its seed is that of the random variants too.
        workers: processes that read; 0 reads in this one.
        device: torch device that trains.
        broken: gets the images that cannot be read.
        speaks: whether to warn of more workers than CPU cores.
    """
    options = loader_options(workers, device)
    loaded = batches(Reader(images, order.seed), speaks, batch_sampler=_Keys(order), collate_fn=_collate, **options)
    for batch, found in loaded:
        for index in sorted(found.keys() - broken.keys()):
            warnings.warn(f"{found[index]}: training takes another image in its place", stacklevel=2)
        broken |= found
        yield batch


def loader_options(workers: int, device: str) -> dict[str, Any]:
    """Return options of a DataLoader; for a GPU, workers read further ahead, and batches are in pinned memory.

    Args:
        workers: processes that read.
        device: torch device that trains.
    """
    if torch.device(device).type != "cuda":
        return {"num_workers": workers}
    return {"num_workers": workers, "pin_memory": True, **({"prefetch_factor": PREFETCH} if workers else {})}


def readable_row(images: ImageSet | LatentSet, index: int) -> tuple[torch.Tensor, ...]:
    """Return a row of a data set, or the next one that can be read, without random variants.

    Args:
        images: the data set.
        index: index of the row.
    """
    plain = images if getattr(images, "vary", None) is None else dataclasses.replace(images, vary=None)
    return Reader(plain)[0, index][0]


def _collate(rows: list[tuple[tuple[torch.Tensor, ...], Broken]]) -> tuple[list[torch.Tensor], Broken]:
    found: Broken = {}
    for _, broken in rows:
        found |= broken
    return default_collate([row for row, _ in rows]), found
