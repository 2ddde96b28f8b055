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
    return torch.Generator().manual_seed(int(state) >> 1)
