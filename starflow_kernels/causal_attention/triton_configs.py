"""Block sizes of the Triton kernels, chosen so that none spills registers on its chip."""

from __future__ import annotations

import torch

from ..triton_runtime import interpreted

CHIPS = {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}

_SMALL = {"forward": (64, 32, 4, 2), "keys": (32, 64, 4, 2), "queries": (64, 32, 4, 2)}
_WIDE = {"forward": (64, 32, 8, 2), "keys": (32, 32, 8, 2), "queries": (32, 32, 8, 2)}

_ANY = {2: {32: _SMALL, 64: _SMALL, 128: _WIDE, 256: _WIDE}, 4: {32: _SMALL, 64: _SMALL, 128: _WIDE, 256: _WIDE}}

# chip -> bytes of a value -> padded head size -> kernel -> (queries and keys of a block, warps, stages)
CONFIGS = {"sm_80": _ANY, "sm_90": _ANY, "sm_100": _ANY, "default": _ANY}


def named(entry: tuple[int, int, int, int]) -> dict[str, int]:
    """An entry of a table as the options of a launch."""
    return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), entry))


def chip_of(x: torch.Tensor) -> str:
    """The chip whose blocks kernels on x take."""
    if interpreted() or torch.version.hip is not None:
        return "default"
    return CHIPS.get(torch.cuda.get_device_capability(x.device), "default")


def configuration(kernel: str, chip: str, width: int, head: int) -> dict[str, int]:
    """An entry of the table."""
    return named(CONFIGS[chip][width][head][kernel])


def config(kernel: str, x: torch.Tensor, half: int) -> dict[str, int]:
    """Blocks, warps and stages; from the chip, the width of the values and the padded head size alone."""
    return configuration(kernel, chip_of(x), x.element_size(), 2 * half)
