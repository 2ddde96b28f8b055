"""Sizes of a sampling step: tiles and launch options of each kernel, and the buffers of a session.

Tile sizes do not depend on the batch, so the bits of a row do not either.
"""

from __future__ import annotations

import math

import torch
import triton

from ..._triton.rotary import half_tile
from ...spec import BlockSpec
from .sessions import Shape
from .tiles import PRODUCT_N

# Widest token that the head kernel computes as a whole; wider ones would spill registers.
WHOLE_TOKEN = 128
# Values per part of a wider token.
TOKEN_PART = 64
# Rows per tile.
BLOCK_M = 16
# Outputs per tile.
BLOCK_N = PRODUCT_N.value
# Programs that a product is split into at most, per tile of rows: three on each processor of an H200.
PROGRAMS = 396
# Most tiles per iteration over the statistics of a row; more would spill registers.
TILES = 32
# Keys per split of attention.
SPLIT = 128
# Most keys per iteration within a split.
BLOCK_S = 64
# Iterations whose keys and values are loaded ahead, with the current one.
STAGES = 3
# Rows of text or given tokens per pass of the network.
PASS_ROWS = 1024


def config(kernel: str, width: int, D: int, d: int, one_byte: bool = False) -> dict[str, int]:
    """Return tile sizes and launch options of a kernel. benchmarks/gpu/triton_resources.py checks that none spills.

    Args:
        kernel: "qkv", "attend", "product", "up", "embed" or "head".
        width: bytes per value of the network.
        D: values per token.
        d: values per head.
        one_byte: whether weights are stored in one byte per value.
    """
    if kernel == "attend":
        # An iteration takes at most 8 KiB of keys.
        return {"BLOCK_S": min(BLOCK_S, max(16, 8192 // (tile(d) * width))), "STAGES": STAGES, "num_warps": 4}
    narrow = width == 2
    tiles = {"BLOCK_N": BLOCK_N, "BLOCK_K": 64 if narrow else 32, "num_warps": 4, "num_stages": 3 if narrow else 2}
    if kernel == "qkv" and half_tile(d) > 64:
        tiles |= {"num_stages": 2}
    elif kernel == "qkv" and one_byte and narrow:
        tiles |= {"num_stages": 4}
    elif kernel == "product" or (kernel in ("qkv", "up") and (narrow or not one_byte)):
        tiles |= {"BLOCK_K": 128, "num_stages": 4} if narrow else {"BLOCK_K": 64, "num_stages": 3}
    elif kernel == "head" and (part := token_part(D)) >= 64:
        tiles |= {"BLOCK_K": 16, "num_warps": 8 if narrow or part > 64 else 4, "num_stages": 2 if narrow else 1}
        tiles |= {} if narrow or part <= 64 else {"BLOCK_N": 16}
        tiles |= {"num_warps": 4 if narrow else 8} if part < D else {}
    elif kernel == "embed":
        tiles |= {"num_stages": 1}
    unused = {"qkv": "BLOCK_N", "product": "BLOCK_N", "embed": "BLOCK_K"}.get(kernel)
    return {name: value for name, value in tiles.items() if name != unused}


def product_parts(width: int, channels: int, bytes_per_value: int, n: int = 1) -> int:
    """Return the number of programs that share each sum over `width` values of a product with `channels` outputs.

    It does not depend on the batch, so that the bits of a row do not either.

    Args:
        width: terms per sum.
        channels: outputs.
        bytes_per_value: of the network.
        n: tokens of each sequence per step.
    """
    blocks = triton.cdiv(width, config("product", bytes_per_value, 0, 0)["BLOCK_K"])
    tiles = triton.cdiv(channels, BLOCK_N) * triton.cdiv(n, BLOCK_M)
    return triton.cdiv(blocks, triton.cdiv(blocks, max(1, PROGRAMS // tiles)))


def tile(n: int) -> int:
    """Return the padded size of a token or a head."""
    return max(16, triton.next_power_of_2(n))


def token_part(D: int) -> int:
    """Return the padded number of values of a token that the head kernel computes at a time, see WHOLE_TOKEN."""
    return tile(D) if D <= WHOLE_TOKEN else TOKEN_PART


def pass_tokens(shape: Shape) -> int:
    """Return the number of text or given tokens per row and pass."""
    most = max(shape.prefix, shape.tokens if shape.fills else 0)
    return max(1, min(most, PASS_ROWS // (shape.samples * shape.branches)))


Buffers = dict[str, tuple[tuple[int, ...], torch.dtype]]


def buffers(spec: BlockSpec, dtype: torch.dtype, shape: Shape, n: int = 1) -> Buffers:
    """Return shape and dtype of every buffer of a session whose steps take n tokens of each sequence."""
    rows, slots, wide = shape.samples * shape.branches, shape.prefix + shape.tokens, torch.float32
    tokens, splits = rows * max(n, pass_tokens(shape)), -(-slots // SPLIT)
    cache = ((spec.layers, rows, spec.kv_heads, slots, spec.head_dim), dtype)
    states = dict.fromkeys(("h_in", "h", "h_next", "residual"), ((tokens, spec.channels), wide))
    noise = dict.fromkeys(("z", "x", "log_scales"), ((shape.samples, shape.tokens, spec.token_dim), wide))
    angles = dict.fromkeys(("cos", "sin"), ((slots, spec.head_dim // 2), wide))
    scores = dict.fromkeys(("split_max", "split_sum"), ((tokens, spec.heads, splits), wide))
    widths = spec.heads * spec.head_dim, spec.mlp_dim, max(spec.text_dim, 1)

    def sums(rows: int, n: int) -> int:
        return rows * max(product_parts(width, spec.channels, dtype.itemsize, n) for width in widths)

    tickets = max(tokens * spec.heads, triton.cdiv(tokens, BLOCK_M) * triton.cdiv(spec.channels, BLOCK_N))
    return {
        "k_cache": cache, "v_cache": cache, **states, **noise, **angles, **scores,
        "split_out": ((tokens, spec.heads, splits, spec.head_dim), wide),
        "q": ((tokens, spec.heads, spec.head_dim), wide),
        "statistics": ((tokens, triton.cdiv(spec.channels, BLOCK_N), 2), wide),
        "attended": ((tokens, spec.heads, spec.head_dim), dtype),
        "hidden": ((tokens, spec.mlp_dim), dtype),
        "partial": ((max(sums(rows * pass_tokens(shape), 1), sums(rows * n, n)), spec.channels), wide),
        "tickets": ((tickets,), torch.int32),
        "guidance": ((shape.samples, shape.tokens), wide),
        "known": ((shape.samples,), torch.int32),
        "cond": ((rows, shape.cond, spec.channels), wide),
        "scale": ((rows,), wide),
        "position": ((max(2, rows),), torch.int32),
    }  # fmt: skip


def size_of(buffers: Buffers) -> int:
    """Return the size of all buffers in bytes."""
    return sum(math.prod(size) * kind.itemsize for size, kind in buffers.values())
