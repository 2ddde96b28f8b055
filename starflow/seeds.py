"""Random number generators that are determined by integers."""

from __future__ import annotations

import numpy as np
import torch


def generator(*key: int) -> torch.Generator:
    """Return a CPU generator whose state depends only on the key.

    Args:
        key: integers >= 0, such as a seed and the number of a step.
    """
    (state,) = np.random.SeedSequence(key).generate_state(1, np.uint64)
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
