"""Blocks of the Triton attention kernels: data, chosen so that no kernel spills registers on its chip.

Triton 3.6 and 3.9 both compile them without spills, with a window and without.
"""

from __future__ import annotations

import torch

from .runtime import interpreted

# By what torch calls the capability of a device.
NVIDIA = {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}
AMD = {(9, 4): "gfx942"}

# op -> chip -> bytes of a value -> padded head size -> kernel -> (queries and keys of a block, warps, stages). Those of
# attention_flow hold for the widest tokens; "default" for other chips, with 64 KiB of shared memory.
BLOCKS = {
    "causal_attention": {
        "sm_80": {
            2: {
                32: {"forward": (128, 64, 4, 3), "keys": (64, 64, 8, 2), "queries": (64, 64, 4, 2)},
                64: {"forward": (128, 64, 8, 3), "keys": (32, 64, 8, 3), "queries": (128, 64, 8, 2)},
                128: {"forward": (128, 32, 8, 2), "keys": (32, 32, 4, 2), "queries": (128, 32, 8, 2)},
                256: {"forward": (64, 32, 8, 2), "keys": (32, 32, 8, 1), "queries": (64, 32, 8, 2)},
            },
            4: {
                32: {"forward": (64, 64, 8, 2), "keys": (32, 64, 8, 1), "queries": (64, 64, 8, 2)},
                64: {"forward": (64, 32, 8, 2), "keys": (32, 32, 8, 2), "queries": (32, 32, 4, 2)},
                128: {"forward": (32, 32, 4, 2), "keys": (16, 64, 8, 2), "queries": (32, 32, 8, 2)},
                256: {"forward": (32, 32, 8, 2), "keys": (32, 32, 8, 1), "queries": (32, 32, 8, 1)},
            },
        },
        "sm_90": {
            2: {
                32: {"forward": (128, 64, 4, 3), "keys": (64, 64, 4, 2), "queries": (128, 64, 4, 2)},
                64: {"forward": (128, 128, 8, 3), "keys": (64, 128, 8, 2), "queries": (128, 64, 8, 2)},
                128: {"forward": (128, 64, 8, 3), "keys": (32, 128, 8, 2), "queries": (128, 64, 8, 2)},
                256: {"forward": (128, 32, 8, 2), "keys": (32, 32, 8, 1), "queries": (64, 32, 8, 2)},
            },
            4: {
                32: {"forward": (64, 64, 8, 2), "keys": (32, 32, 8, 2), "queries": (64, 64, 8, 2)},
                64: {"forward": (64, 64, 8, 2), "keys": (32, 32, 8, 1), "queries": (64, 32, 8, 2)},
                128: {"forward": (32, 32, 4, 2), "keys": (16, 32, 8, 2), "queries": (32, 16, 8, 2)},
                256: {"forward": (64, 16, 8, 2), "keys": (16, 32, 8, 1), "queries": (32, 32, 8, 1)},
            },
        },
        "sm_100": {
            2: {
                32: {"forward": (128, 64, 4, 3), "keys": (64, 64, 8, 2), "queries": (128, 64, 8, 2)},
                64: {"forward": (128, 64, 8, 3), "keys": (32, 128, 8, 2), "queries": (128, 32, 8, 2)},
                128: {"forward": (128, 64, 8, 3), "keys": (32, 64, 8, 2), "queries": (128, 64, 8, 2)},
                256: {"forward": (128, 32, 8, 2), "keys": (32, 32, 8, 1), "queries": (64, 32, 8, 2)},
            },
            4: {
                32: {"forward": (64, 64, 8, 2), "keys": (32, 64, 8, 1), "queries": (64, 64, 8, 2)},
                64: {"forward": (64, 64, 8, 2), "keys": (32, 32, 8, 1), "queries": (64, 32, 8, 2)},
                128: {"forward": (64, 16, 8, 2), "keys": (16, 32, 8, 2), "queries": (32, 16, 8, 2)},
                256: {"forward": (64, 16, 8, 2), "keys": (16, 32, 8, 1), "queries": (32, 32, 8, 1)},
            },
        },
        "gfx942": {
            2: {
                32: {"forward": (128, 64, 4, 3), "keys": (64, 64, 4, 2), "queries": (64, 64, 4, 2)},
                64: {"forward": (128, 64, 8, 3), "keys": (32, 64, 8, 1), "queries": (128, 32, 8, 2)},
                128: {"forward": (128, 32, 8, 2), "keys": (16, 32, 8, 1), "queries": (32, 32, 4, 2)},
                256: {"forward": (32, 32, 8, 2), "keys": (16, 32, 8, 1), "queries": (32, 32, 4, 1)},
            },
            4: {
                32: {"forward": (64, 64, 8, 2), "keys": (64, 64, 4, 1), "queries": (64, 64, 8, 2)},
                64: {"forward": (64, 32, 8, 2), "keys": (32, 32, 4, 2), "queries": (32, 32, 4, 2)},
                128: {"forward": (32, 32, 4, 2), "keys": (32, 32, 4, 1), "queries": (32, 32, 4, 2)},
                256: {"forward": (32, 32, 4, 1), "keys": (16, 32, 4, 1), "queries": (32, 16, 4, 1)},
            },
        },
        "default": {
            2: {
                32: {"forward": (128, 64, 4, 3), "keys": (64, 64, 4, 2), "queries": (64, 64, 4, 2)},
                64: {"forward": (128, 64, 8, 3), "keys": (32, 64, 8, 1), "queries": (128, 32, 8, 2)},
                128: {"forward": (128, 32, 8, 2), "keys": (16, 32, 8, 1), "queries": (32, 32, 4, 2)},
                256: {"forward": (32, 32, 8, 2), "keys": (16, 32, 8, 1), "queries": (32, 32, 4, 2)},
            },
            4: {
                32: {"forward": (64, 64, 8, 2), "keys": (64, 64, 8, 2), "queries": (64, 64, 8, 2)},
                64: {"forward": (64, 32, 8, 2), "keys": (32, 32, 4, 2), "queries": (32, 32, 4, 2)},
                128: {"forward": (32, 32, 4, 2), "keys": (32, 32, 8, 2), "queries": (32, 32, 8, 2)},
                256: {"forward": (32, 32, 8, 1), "keys": (16, 32, 8, 1), "queries": (32, 16, 8, 1)},
            },
        },
    },
    "attention_flow": {
        "sm_80": {
            2: {
                32: {"forward": (64, 32, 8, 2), "keys": (16, 32, 8, 1), "queries": (128, 64, 8, 2)},
                64: {"forward": (64, 32, 8, 2), "keys": (16, 32, 8, 1), "queries": (128, 32, 8, 2)},
                128: {"forward": (16, 32, 8, 1), "keys": (32, 32, 8, 1), "queries": (64, 32, 8, 2)},
            },
            4: {
                32: {"forward": (32, 32, 8, 2), "keys": (16, 32, 8, 1), "queries": (64, 32, 8, 2)},
                64: {"forward": (16, 32, 8, 1), "keys": (16, 16, 8, 1), "queries": (32, 32, 8, 1)},
            },
        },
        "sm_90": {
            2: {
                32: {"forward": (64, 64, 8, 2), "keys": (32, 64, 8, 1), "queries": (128, 64, 8, 2)},
                64: {"forward": (64, 64, 8, 2), "keys": (16, 32, 8, 1), "queries": (128, 64, 8, 2)},
                128: {"forward": (64, 32, 8, 1), "keys": (32, 32, 8, 1), "queries": (64, 32, 8, 2)},
            },
            4: {
                32: {"forward": (32, 32, 8, 3), "keys": (16, 32, 8, 1), "queries": (64, 32, 8, 2)},
                64: {"forward": (16, 32, 8, 1), "keys": (16, 16, 8, 1), "queries": (32, 32, 8, 2)},
            },
        },
        "sm_100": {
            2: {
                32: {"forward": (64, 64, 8, 2), "keys": (16, 32, 8, 1), "queries": (128, 64, 8, 2)},
                64: {"forward": (64, 64, 8, 2), "keys": (16, 64, 8, 2), "queries": (128, 64, 8, 2)},
                128: {"forward": (64, 32, 8, 1), "keys": (32, 32, 8, 1), "queries": (64, 32, 8, 2)},
            },
            4: {
                32: {"forward": (32, 32, 8, 2), "keys": (16, 32, 8, 1), "queries": (64, 32, 8, 2)},
                64: {"forward": (16, 32, 8, 1), "keys": (16, 16, 8, 1), "queries": (32, 32, 8, 2)},
            },
        },
        "gfx942": {
            2: {
                32: {"forward": (64, 64, 8, 2), "keys": (16, 32, 8, 1), "queries": (128, 64, 8, 2)},
                64: {"forward": (64, 32, 8, 2), "keys": (32, 32, 4, 1), "queries": (128, 32, 8, 1)},
                128: {"forward": (16, 32, 8, 1), "keys": (32, 32, 4, 1), "queries": (64, 32, 4, 2)},
            },
            4: {
                32: {"forward": (32, 32, 8, 2), "keys": (16, 32, 8, 1), "queries": (64, 32, 8, 2)},
                64: {"forward": (16, 32, 8, 1), "keys": (16, 16, 8, 1), "queries": (32, 32, 4, 1)},
            },
        },
        "default": {
            2: {
                32: {"forward": (64, 64, 8, 2), "keys": (16, 32, 8, 1), "queries": (128, 64, 8, 2)},
                64: {"forward": (64, 32, 8, 2), "keys": (16, 32, 8, 1), "queries": (128, 32, 8, 2)},
                128: {"forward": (16, 32, 8, 1), "keys": (32, 32, 8, 1), "queries": (64, 32, 8, 2)},
            },
            4: {
                32: {"forward": (32, 32, 8, 2), "keys": (16, 32, 8, 1), "queries": (64, 32, 8, 2)},
                64: {"forward": (16, 32, 8, 1), "keys": (16, 16, 8, 1), "queries": (32, 32, 8, 2)},
            },
        },
    },
}


def blocks(op: str, kernel: str, chip: str, width: int, head: int) -> dict[str, int]:
    """An entry of the table as the options of a launch."""
    of_chip = BLOCKS[op].get(chip, BLOCKS[op]["default"])
    return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), of_chip[width][head][kernel]))


def chip_of(device: torch.device) -> str:
    """The name of a device's chip in the tables of blocks, "default" for those that have no blocks of their own."""
    if interpreted():
        return "default"
    names = NVIDIA if torch.version.hip is None else AMD
    return names.get(torch.cuda.get_device_capability(device), "default")


def config(op: str, kernel: str, x: torch.Tensor, half: int) -> dict[str, int]:
    """Blocks, warps and stages; from the chip, the width of the values and the padded head size alone."""
    return blocks(op, kernel, chip_of(x.device), x.element_size(), 2 * half)
