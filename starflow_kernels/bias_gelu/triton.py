"""Addition of a bias and exact GELU in Triton.

The gradient of the bias is a sum over all rows. A fixed number of programs each add a share of the rows in order, and
torch adds these sums, so that the bits do not depend on timing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._triton.runtime import refuse_tensors

SHARES = 64
CONFIG = {"ROWS": 8, "BLOCK": 128, "num_warps": 4}
SQRT_HALF = tl.constexpr(0.7071067811865476)
# 1 / sqrt(2 pi), the normal density at 0.
DENSITY_AT_0 = tl.constexpr(0.3989422804014327)


@triton.jit
def _load_with_bias(x, bias, row, c, N, C, BIAS: tl.constexpr):
    """Return the offsets and the mask of a tile, and its values x + bias."""
    offsets, inside = row.to(tl.int64)[:, None] * C + c[None, :], (row < N)[:, None] & (c < C)[None, :]
    y = tl.load(x + offsets, inside, 0).to(tl.float32)  # (ROWS, BLOCK)
    if BIAS:
        y += tl.load(bias + c, c < C, 0).to(tl.float32)[None, :]  # (1, BLOCK)
    return offsets, inside, y


@triton.jit(do_not_specialize=("N",))
def bias_gelu_forward_kernel(x, bias, out, N, C, BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Store y Phi(y) of a tile, y = x + bias."""
    columns = tl.cdiv(C, BLOCK)
    row = tl.program_id(0) // columns * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % columns * BLOCK + tl.arange(0, BLOCK)
    offsets, inside, y = _load_with_bias(x, bias, row, c, N, C, BIAS)
    tl.store(out + offsets, 0.5 * y * (1 + tl.erf(y * SQRT_HALF)), inside)


@triton.jit(do_not_specialize=("N", "programs"))
def bias_gelu_backward_kernel(
    x, bias, grad, grad_x, partial, N, C, programs, BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Store the gradient of every `programs`-th tile of some columns, and its sum over rows for the bias."""
    columns = tl.cdiv(C, BLOCK)
    share = tl.program_id(0) // columns
    c = tl.program_id(0) % columns * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(share * ROWS, N, programs * ROWS):
        offsets, inside, y = _load_with_bias(x, bias, start + tl.arange(0, ROWS), c, N, C, BIAS)
        slope = 0.5 * (1 + tl.erf(y * SQRT_HALF)) + y * tl.exp(-0.5 * y * y) * DENSITY_AT_0
        g_x = tl.load(grad + offsets, inside, 0).to(tl.float32) * slope  # (ROWS, BLOCK)
        tl.store(grad_x + offsets, g_x, inside)
        total += tl.sum(g_x, 0)
    if BIAS:
        tl.store(partial + share * C + c, total, c < C)


def _tile_count(x: torch.Tensor) -> int:
    return triton.cdiv(x.shape[0] * x.shape[1], CONFIG["ROWS"]) * triton.cdiv(x.shape[2], CONFIG["BLOCK"])


def refuse(x, bias) -> str | None:
    """Return why the kernels cannot take these arguments, or None."""
    if _tile_count(x) >= 2**31 or x.shape[0] * x.shape[1] >= 2**31 - SHARES * CONFIG["ROWS"]:
        return "it takes fewer than 2^31 rows and tiles"
    return refuse_tensors(x, bias)


def refuse_backward(grads, outputs, *args) -> str | None:
    """Return why the backward kernels cannot take these arguments, or None."""
    return refuse(*args)


def bias_gelu(x, bias) -> torch.Tensor:
    """See reference.bias_gelu."""
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    (B, T, C), out = x.shape, torch.empty_like(x)
    if B:
        bias_gelu_forward_kernel[(_tile_count(x),)](x, bias, out, B * T, C, BIAS=bias is not None, **CONFIG)
    return out


def bias_gelu_backward(grads, outputs, x, bias) -> list[torch.Tensor]:
    """See reference.bias_gelu_backward."""
    grad, x, bias = grads[0].contiguous(), x.contiguous(), None if bias is None else bias.contiguous()
    (B, T, C), grad_x = x.shape, torch.empty_like(x)
    programs = min(SHARES, triton.cdiv(B * T, CONFIG["ROWS"]))
    partial = x.new_empty((programs, C), dtype=torch.float32)
    if B:
        bias_gelu_backward_kernel[(programs * triton.cdiv(C, CONFIG["BLOCK"]),)](
            x, bias, grad, grad_x, partial, B * T, C, programs, BIAS=bias is not None, **CONFIG
        )
    return [grad_x] if bias is None else [grad_x, partial.sum(0).to(bias.dtype)]
