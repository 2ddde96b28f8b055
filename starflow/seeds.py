"""Random number generators that are determined by integers."""

from __future__ import annotations

import operator
from typing import SupportsIndex

import numpy as np
import torch

from .errors import ConfigError

MAX_SEED = 2**64 - 1


def check_seed(seed: SupportsIndex, name: str = "seed") -> int:
    """Return a seed as an int.

    Args:
        seed: integer from 0 to MAX_SEED.
        name: name of the seed for the message.

    Raises:
        ConfigError: the seed is no integer, or out of range.
    """
    try:
        number = operator.index(seed)
    except TypeError:
        number = -1
    if isinstance(seed, bool) or not 0 <= number <= MAX_SEED:
        raise ConfigError(f"{name}={seed!r}: expected an integer from 0 to 2^64 - 1")
    return number


def generator(*key: SupportsIndex) -> torch.Generator:
    """Return a CPU generator whose state depends only on the key.

    Args:
        key: integers from 0 to MAX_SEED, such as a seed and the number of a step.

    Raises:
        ConfigError: a part of the key is no integer, or out of range.
    """
    (state,) = np.random.SeedSequence([check_seed(part) for part in key]).generate_state(1, np.uint64)
    return torch.Generator(device="cpu").manual_seed(int(state) >> 1)


def permutation(count: int, random: torch.Generator) -> list[int]:
    """Return 0 .. count - 1 in random order.

    Args:
        count: number of integers.
        random: CPU generator.
    """
    return torch.randperm(count, generator=random, dtype=torch.int64, device="cpu").tolist()


def normal(shape: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    """Return standard normal float32 values on the CPU.

    Args:
        shape: shape of the result.
        random: CPU generator.
    """
    return torch.randn(shape, generator=random, dtype=torch.float32, device="cpu")
