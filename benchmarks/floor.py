"""Least time of sampling, whatever the code: the bytes that a token step reads and the operations that it does.

The floor is the larger of bytes / copy bandwidth and operations / peak of matrix products in the dtype of the
weights, both measured in the same run. A step of a block, for all rows (2B under guidance), has to

- read every weight once; of the position table only one row, of the text projection nothing;
- read the keys and values of the slots that it sees, text included, once per row and KV head. Step s sees prefix + s
  + 1 slots, on average prefix + (steps + 1) / 2. It also writes one slot;
- read the noise of a token and write the token;
- do two operations per weight of a matrix and row, and four per visible slot, row, head and value of a head.

Weights and cache count with the bytes per value that they have in memory. A `resident` block fits on the chip: its
weights are read once per call, and its cache never leaves the chip. Not counted are norms, GELU, softmax, guidance,
activations between kernels, the pass over the text, and what a device keeps in its cache from one step to the next. A
block smaller than that cache can therefore be faster than its floor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from starflow_kernels import BlockSpec


class Work(NamedTuple):
    """Bytes, operations and token steps of a whole call."""

    bytes: float
    operations: float
    steps: int

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(self, other)))

    def seconds(self, ceilings: dict[str, float], dtype: torch.dtype) -> float:
        """Return the floor of the call."""
        peak = ceilings["float32_operations_a_second" if dtype == torch.float32 else "operations_a_second"]
        return max(self.bytes / ceilings["bytes_a_second"], self.operations / peak)


def block_work(
    spec: BlockSpec,
    samples: int,
    tokens: int,
    *,
    copies: int = 1,
    prefix: int = 0,
    weight_bytes: float = 2,
    cache_bytes: float = 2,
    resident: bool = False,
) -> Work:
    """Return the work of `tokens` tokens of each sample through one block; copies is 2 under guidance, else 1."""
    steps, rows = tokens if spec.start else tokens - 1, samples * copies
    sizes = {n: shape for n, shape in spec.weight_shapes.items() if n != "pos_embed" and not n.startswith("proj_text")}
    matrices = sum(shape[0] * shape[1] for shape in sizes.values() if len(shape) == 2)
    vectors = sum(shape[0] for shape in sizes.values() if len(shape) == 1) + (spec.channels if spec.positions else 0)
    seen = prefix + (steps + 1) / 2
    cache = 2 * spec.layers * rows * spec.kv_heads * spec.head_dim * (seen + 1)
    state = 4 * 2 * samples * spec.token_dim
    weights = (matrices + vectors) * weight_bytes
    moved = weights + steps * state if resident else steps * (weights + cache * cache_bytes + state)
    scores = 2 * spec.layers * spec.heads * spec.head_dim * seen
    return Work(moved, 2 * steps * rows * (matrices + scores), steps)
