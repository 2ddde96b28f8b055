"""Exact GELU behind a bias in Triton.

The gradient of the bias is a sum over all rows: a fixed number of programs adds up its share of them, one after
another, and torch adds the shares.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._triton.runtime import refuse_tensors

PARTS = 64
CONFIG = {"ROWS": 8, "BLOCK": 128, "num_warps": 4}
HALF_ROOT = tl.constexpr(0.7071067811865476)
DENSITY = tl.constexpr(0.3989422804014327)


@triton.jit
def _load(x, bias, row, c, N, C, BIAS: tl.constexpr):
    """Where a tile lies, which of it exists, and x + bias."""
    at, inside = row.to(tl.int64)[:, None] * C + c[None, :], (row < N)[:, None] & (c < C)[None, :]
    y = tl.load(x + at, inside, 0).to(tl.float32)
    if BIAS:
        y += tl.load(bias + c, c < C, 0).to(tl.float32)[None, :]
    return at, inside, y


@triton.jit
def forward_kernel(x, bias, out, N, C, BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """y Phi(y) of a tile."""
    columns = tl.cdiv(C, BLOCK)
    row = tl.program_id(0) // columns * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % columns * BLOCK + tl.arange(0, BLOCK)
    at, inside, y = _load(x, bias, row, c, N, C, BIAS)
    tl.store(out + at, 0.5 * y * (1 + tl.erf(y * HALF_ROOT)), inside)


@triton.jit
def backward_kernel(
    x, bias, grad, grad_x, partial, N, C, programs, BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Gradient of every `programs`-th tile of some columns, and the sum over them for the bias."""
    columns = tl.cdiv(C, BLOCK)
    share = tl.program_id(0) // columns
    c = tl.program_id(0) % columns * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(share * ROWS, N, programs * ROWS):
        at, inside, y = _load(x, bias, start + tl.arange(0, ROWS), c, N, C, BIAS)
        slope = 0.5 * (1 + tl.erf(y * HALF_ROOT)) + y * tl.exp(-0.5 * y * y) * DENSITY
        found = tl.load(grad + at, inside, 0).to(tl.float32) * slope
        tl.store(grad_x + at, found, inside)
        total += tl.sum(found, 0)
    if BIAS:
        tl.store(partial + share * C + c, total, c < C)


def _tiles(x: torch.Tensor) -> int:
    return triton.cdiv(x.shape[0] * x.shape[1], CONFIG["ROWS"]) * triton.cdiv(x.shape[2], CONFIG["BLOCK"])


def refuse(x, bias) -> str | None:
    """Why these arguments cannot run here, or None."""
    if _tiles(x) >= 2**31 or x.shape[0] * x.shape[1] >= 2**31 - PARTS * CONFIG["ROWS"]:
        return "it takes fewer than 2^31 rows and tiles"
    return refuse_tensors(x, bias)


def refuse_backward(grads, outputs, *args) -> str | None:
    """The same for the gradient."""
    return refuse(*args)


def bias_gelu(x, bias) -> torch.Tensor:
    """See reference.bias_gelu."""
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    (B, T, C), out = x.shape, torch.empty_like(x)
    if B:
        forward_kernel[(_tiles(x),)](x, bias, out, B * T, C, BIAS=bias is not None, **CONFIG)
    return out


def bias_gelu_backward(grads, outputs, x, bias) -> list[torch.Tensor]:
    """See reference.bias_gelu_backward."""
    grad, x, bias = grads[0].contiguous(), x.contiguous(), None if bias is None else bias.contiguous()
    (B, T, C), grad_x = x.shape, torch.empty_like(x)
    programs = min(PARTS, triton.cdiv(B * T, CONFIG["ROWS"]))
    partial = x.new_empty((programs, C), dtype=torch.float32)
    if B:
        backward_kernel[(programs * triton.cdiv(C, CONFIG["BLOCK"]),)](
            x, bias, grad, grad_x, partial, B * T, C, programs, BIAS=bias is not None, **CONFIG
        )
    return [grad_x] if bias is None else [grad_x, partial.sum(0).to(bias.dtype)]
