"""Residual sum and norm in Triton. A program holds whole rows, so that every tensor is read or written once.

The gradients of weight and bias are sums over all rows. A fixed number of programs each add a share of the rows in
order, and torch adds these sums, so that the bits do not depend on timing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._triton.math import inverse_root, mean_of
from .._triton.runtime import contiguous, refuse_tensors
from .reference import used_norm

WIDEST = 8192
SHARES = 512


def config(C: int) -> dict[str, int]:
    """Return the rows, channels and warps per program, for C channels."""
    block = max(16, triton.next_power_of_2(C))
    return {"ROWS": max(1, 1024 // block), "BLOCK": block, "num_warps": min(16, max(2, block // 512))}


@triton.jit
def _normalized(x, inside, C, eps, KIND: tl.constexpr):
    """Return the rows (ROWS, BLOCK), centered for "layer_norm" and divided by their size, and 1 / size (ROWS, 1)."""
    if KIND == "layer_norm":
        x = tl.where(inside, x - mean_of(tl.sum(x, 1), C)[:, None], 0.0)
    size = inverse_root(mean_of(tl.sum(x * x, 1), C) + eps)
    return x * size[:, None], size[:, None]


@triton.jit
def _factor(weight, c, C, KIND: tl.constexpr):
    w = tl.load(weight + c, c < C, 0).to(tl.float32)  # (BLOCK,)
    return (w if KIND == "layer_norm" else 1 + w)[None, :]


@triton.jit(do_not_specialize=("N",))
def residual_norm_forward_kernel(
    x, update, weight, bias, total, normed, N, C, eps,
    KIND: tl.constexpr, UPDATE: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the sums and norms of ROWS rows."""
    row, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    offsets, inside = row.to(tl.int64)[:, None] * C + c[None, :], (row < N)[:, None] & (c < C)[None, :]
    value = tl.load(x + offsets, inside, 0).to(tl.float32)  # (ROWS, BLOCK)
    if UPDATE:
        value += tl.load(update + offsets, inside, 0).to(tl.float32)  # (ROWS, BLOCK)
        # The norm takes the sum as it is stored, rounded.
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + offsets, rounded, inside)
        value = rounded.to(tl.float32)
    y, _ = _normalized(value, inside, C, eps, KIND)
    if WEIGHT:
        y *= _factor(weight, c, C, KIND)
    if BIAS:
        y += tl.load(bias + c, c < C, 0).to(tl.float32)[None, :]  # (1, BLOCK)
    tl.store(normed + offsets, y, inside)


@triton.jit(do_not_specialize=("N", "programs"))
def residual_norm_backward_kernel(
    total, weight, grad_total, grad_normed, grad_x, partial, N, C, eps, programs,
    KIND: tl.constexpr, HAS_TOTAL: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the gradient of every `programs`-th block of rows, and its sums over rows for weight and bias."""
    c = tl.arange(0, BLOCK)
    g_weight, g_bias = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    factor = _factor(weight, c, C, KIND) if WEIGHT else tl.full([1, BLOCK], 1.0, tl.float32)
    for start in range(tl.program_id(0) * ROWS, N, programs * ROWS):
        row = start + tl.arange(0, ROWS)
        offsets, inside = row.to(tl.int64)[:, None] * C + c[None, :], (row < N)[:, None] & (c < C)[None, :]
        value = tl.load(total + offsets, inside, 0).to(tl.float32)  # (ROWS, BLOCK)
        y, size = _normalized(value, inside, C, eps, KIND)
        grad = tl.load(grad_normed + offsets, inside, 0).to(tl.float32)  # (ROWS, BLOCK)
        if WEIGHT:
            g_weight += tl.sum(grad * y, 0)
        if BIAS:
            g_bias += tl.sum(grad, 0)
        grad *= factor
        g_x = grad - y * mean_of(tl.sum(grad * y, 1), C)[:, None]
        if KIND == "layer_norm":
            g_x -= mean_of(tl.sum(grad, 1), C)[:, None]
        g_x *= size
        if HAS_TOTAL:
            g_x += tl.load(grad_total + offsets, inside, 0).to(tl.float32)  # (ROWS, BLOCK)
        tl.store(grad_x + offsets, g_x, inside)
    pointers = partial + tl.program_id(0) * C + c
    if WEIGHT:
        tl.store(pointers, g_weight, c < C)
    if BIAS:
        tl.store(pointers + programs * C, g_bias, c < C)


def refuse(x, update, weight, bias, *options) -> str | None:
    """Return why the kernels cannot take these arguments, or None."""
    if x.shape[2] > WIDEST:
        return f"rows of {x.shape[2]} values, it takes up to {WIDEST}"
    if x.shape[0] * x.shape[1] >= 2**31 - 64 * SHARES:
        return "it takes fewer than 2^31 rows"
    return refuse_tensors(x, update, weight, bias)


def refuse_backward(grads, outputs, *args) -> str | None:
    """Return why the backward kernels cannot take these arguments, or None."""
    return refuse(*args)


def residual_norm(x, update, weight, bias, kind, eps) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.residual_norm."""
    (B, T, C), options = x.shape, config(x.shape[2])
    x, update, weight, bias = contiguous(x, update, weight, bias)
    total, normed = x.new_empty(0 if update is None else x.shape), torch.empty_like(x)
    if B:
        residual_norm_forward_kernel[(triton.cdiv(B * T, options["ROWS"]),)](
            x, update, weight, bias, total, normed, B * T, C, eps,
            KIND=kind, UPDATE=update is not None, WEIGHT=weight is not None, BIAS=bias is not None, **options,
        )  # fmt: skip
    return total, normed


def residual_norm_backward(grads, outputs, x, update, weight, bias, kind, eps) -> list[torch.Tensor]:
    """See reference.residual_norm_backward."""
    (B, T, C), options = x.shape, config(x.shape[2])
    total, grad_total = (x, None) if outputs[0].shape != x.shape else (outputs[0], grads[0])
    total, grad_normed = used_norm(total, grads[1])
    total, weight, grad_total, grad_normed = contiguous(total, weight, grad_total, grad_normed)
    programs = min(SHARES, triton.cdiv(B * T, options["ROWS"]))
    grad_x, partial = torch.empty_like(total), total.new_empty((2, programs, C), dtype=torch.float32)
    if B:
        residual_norm_backward_kernel[(programs,)](
            total, weight, grad_total, grad_normed, grad_x, partial, B * T, C, eps, programs,
            KIND=kind, HAS_TOTAL=grad_total is not None, WEIGHT=weight is not None,
            BIAS=bias is not None, **options,
        )  # fmt: skip
    sums = [partial[i].sum(0).to(like.dtype) for i, like in enumerate((weight, bias)) if like is not None]
    return [grad_x, *sums]
