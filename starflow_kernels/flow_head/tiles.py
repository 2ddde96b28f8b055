"""Block sizes of the Triton kernels of flow_head, by chip, dtype and width; no kernel spills registers."""

from __future__ import annotations

import torch

# BLOCK_D -> (tokens per block, channels per block, warps). Larger sizes spill registers on some target.
NARROW = {16: (64, 64, 4), 32: (32, 64, 4), 64: (16, 64, 4), 128: (32, 32, 8), 256: (16, 16, 8)}
FLOAT32 = {16: (32, 16, 4), 32: (32, 32, 4), 64: (16, 32, 8), 128: (16, 16, 8), 256: (8, 16, 8)}
# (bytes per value, BLOCK_D) -> sizes for gfx942 where they differ: with half as many threads, each has twice the
# registers.
GFX942 = {(2, 128): (32, 32, 4), (4, 256): (16, 16, 4)}
WIDEST = max(NARROW)


def config(D: int, dtype: torch.dtype, chip: str) -> dict[str, int]:
    """Return the launch options for tokens of D values and a weight of `dtype` on a chip."""
    block_d = next(width for width in NARROW if width >= D)
    sizes = (FLOAT32 if dtype == torch.float32 else NARROW)[block_d]
    block_t, block_c, warps = GFX942.get((dtype.itemsize, block_d), sizes) if chip == "gfx942" else sizes
    return {"BLOCK_T": block_t, "BLOCK_C": block_c, "BLOCK_D": block_d, "num_warps": warps, "num_stages": 2}
