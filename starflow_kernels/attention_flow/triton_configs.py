"""Block sizes of the Triton kernels, chosen so that none spills registers on its chip at the widest tokens."""

from __future__ import annotations

import torch

from ..causal_attention.triton_configs import chip_of, named

_ANY = {"forward": (32, 32, 4, 2), "keys": (32, 32, 4, 2), "queries": (32, 32, 4, 2)}
_ALL = {2: {32: _ANY, 64: _ANY, 128: _ANY}, 4: {32: _ANY, 64: _ANY, 128: _ANY}}

# chip -> bytes of a value -> padded head size -> kernel -> (queries and keys of a block, warps, stages)
CONFIGS = {"sm_80": _ALL, "sm_90": _ALL, "sm_100": _ALL, "default": _ALL}


def configuration(kernel: str, chip: str, width: int, head: int) -> dict[str, int]:
    """An entry of the table by name."""
    return named(CONFIGS[chip][width][head][kernel])


def config(kernel: str, x: torch.Tensor, half: int) -> dict[str, int]:
    """Blocks, warps and stages; from the chip, the width of the values and the padded head size alone."""
    return configuration(kernel, chip_of(x), x.element_size(), 2 * half)
