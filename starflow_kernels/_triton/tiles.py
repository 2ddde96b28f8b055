"""Block sizes of the Triton attention kernels, chosen so that no kernel spills registers on the chip.

Triton 3.6 and 3.9 compile all entries without spills, with and without a window.
"""

from __future__ import annotations

import torch

from .runtime import interpreted

# Compute capability, as torch reports it -> name of the chip.
NVIDIA = {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}
AMD = {(9, 4): "gfx942"}

# op -> chip -> bytes per value -> padded head size -> kernel -> (queries per block, keys per block, warps, stages).
# The entries of attention_flow are for the widest tokens. "default" is for all other chips; it needs 64 KiB of shared
# memory.
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
                256: {"forward": (128, 32, 8, 2), "keys": (32, 32, 8, 1), "queries": (64, 16, 8, 2)},
            },
            4: {
                32: {"forward": (64, 32, 8, 2), "keys": (32, 32, 8, 2), "queries": (64, 64, 8, 2)},
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
    """Return the block sizes of a kernel as launch options.

    Args:
        op: "causal_attention" or "attention_flow".
        kernel: "forward", "keys" or "queries".
        chip: name of the chip; an unknown chip gets the sizes of "default".
        width: bytes per value.
        head: padded head size.
    """
    sizes = BLOCKS[op].get(chip, BLOCKS[op]["default"])
    return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), sizes[width][head][kernel]))


def chip_of(device: torch.device) -> str:
    """Return the name of a device's chip in BLOCKS, or "default" for a chip without an entry."""
    if interpreted():
        return "default"
    names = NVIDIA if torch.version.hip is None else AMD
    return names.get(torch.cuda.get_device_capability(device), "default")


def config(op: str, kernel: str, x: torch.Tensor, half: int) -> dict[str, int]:
    """Return the launch options, which depend only on op, kernel, chip, dtype and the padded half head `half`."""
    return blocks(op, kernel, chip_of(x.device), x.element_size(), 2 * half)
