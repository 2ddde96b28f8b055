"""Residual sum and norm in Triton: a program holds whole rows, so that every tensor is read and written once.

The gradients of weight and bias are sums over all rows: a fixed number of programs adds up its share of them, one after
another, and torch adds the shares.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._triton.runtime import refuse_tensors

WIDEST = 8192
PARTS = 512


def config(C: int) -> dict[str, int]:
    """Rows and channels of a program, and its warps; from the channels alone."""
    block = max(16, triton.next_power_of_2(C))
    return {"ROWS": max(1, 1024 // block), "BLOCK": block, "num_warps": min(16, max(2, block // 512))}


@triton.jit
def _normalised(x, inside, C, eps, KIND: tl.constexpr):
    """Rows without mean, times 1 / their size, and that."""
    if KIND == "layer_norm":
        x = tl.where(inside, x - (tl.sum(x, 1) / C)[:, None], 0.0)
    size = 1 / tl.sqrt(tl.sum(x * x, 1) / C + eps)
    return x * size[:, None], size[:, None]


@triton.jit
def _factor(weight, c, C, KIND: tl.constexpr):
    w = tl.load(weight + c, c < C, 0).to(tl.float32)
    return (w if KIND == "layer_norm" else 1 + w)[None, :]


@triton.jit
def forward_kernel(
    x, update, weight, bias, total, normed, N, C, eps,
    KIND: tl.constexpr, UPDATE: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum and norm of ROWS rows."""
    row, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    at, inside = row.to(tl.int64)[:, None] * C + c[None, :], (row < N)[:, None] & (c < C)[None, :]
    value = tl.load(x + at, inside, 0).to(tl.float32)
    if UPDATE:
        value += tl.load(update + at, inside, 0).to(tl.float32)
        # The norm is that of the sum as it is stored.
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + at, rounded, inside)
        value = rounded.to(tl.float32)
    y, _ = _normalised(value, inside, C, eps, KIND)
    if WEIGHT:
        y *= _factor(weight, c, C, KIND)
    if BIAS:
        y += tl.load(bias + c, c < C, 0).to(tl.float32)[None, :]
    tl.store(normed + at, y, inside)


@triton.jit
def backward_kernel(
    total, weight, grad_total, grad_normed, grad_x, partial, N, C, eps, programs,
    KIND: tl.constexpr, HAS_TOTAL: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of every `programs`-th block of rows, and the sums over them for weight and bias."""
    c = tl.arange(0, BLOCK)
    to_weight, to_bias = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    factor = _factor(weight, c, C, KIND) if WEIGHT else tl.full([1, BLOCK], 1.0, tl.float32)
    for start in range(tl.program_id(0) * ROWS, N, programs * ROWS):
        row = start + tl.arange(0, ROWS)
        at, inside = row.to(tl.int64)[:, None] * C + c[None, :], (row < N)[:, None] & (c < C)[None, :]
        y, size = _normalised(tl.load(total + at, inside, 0).to(tl.float32), inside, C, eps, KIND)
        grad = tl.load(grad_normed + at, inside, 0).to(tl.float32)
        if WEIGHT:
            to_weight += tl.sum(grad * y, 0)
        if BIAS:
            to_bias += tl.sum(grad, 0)
        grad *= factor
        found = grad - y * (tl.sum(grad * y, 1) / C)[:, None]
        if KIND == "layer_norm":
            found -= (tl.sum(grad, 1) / C)[:, None]
        found *= size
        if HAS_TOTAL:
            found += tl.load(grad_total + at, inside, 0).to(tl.float32)
        tl.store(grad_x + at, found, inside)
    to = partial + tl.program_id(0) * C + c
    if WEIGHT:
        tl.store(to, to_weight, c < C)
    if BIAS:
        tl.store(to + programs * C, to_bias, c < C)


def refuse(x, update, weight, bias, *options) -> str | None:
    """Why these arguments cannot run here, or None."""
    if x.shape[2] > WIDEST:
        return f"rows of {x.shape[2]} values, it takes up to {WIDEST}"
    if x.shape[0] * x.shape[1] >= 2**31 - 64 * PARTS:
        return "it takes fewer than 2^31 rows"
    return refuse_tensors(x, update, weight, bias)


def refuse_backward(grads, outputs, *args) -> str | None:
    """The same for the gradient."""
    return refuse(*args)


def _contiguous(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def residual_norm(x, update, weight, bias, kind, eps) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.residual_norm."""
    (B, T, C), options = x.shape, config(x.shape[2])
    x, update, weight, bias = _contiguous(x, update, weight, bias)
    total, normed = x.new_empty(0 if update is None else x.shape), torch.empty_like(x)
    if B:
        forward_kernel[(triton.cdiv(B * T, options["ROWS"]),)](
            x, update, weight, bias, total, normed, B * T, C, eps,
            KIND=kind, UPDATE=update is not None, WEIGHT=weight is not None, BIAS=bias is not None, **options,
        )  # fmt: skip
    return total, normed


def residual_norm_backward(grads, outputs, x, update, weight, bias, kind, eps) -> list[torch.Tensor]:
    """See reference.residual_norm_backward."""
    (B, T, C), options = x.shape, config(x.shape[2])
    total, grad_total = (x, None) if outputs[0].shape != x.shape else (outputs[0], grads[0])
    total, weight, grad_total, grad_normed = _contiguous(total, weight, grad_total, grads[1])
    grad_normed = torch.zeros_like(total) if grad_normed is None else grad_normed
    programs = min(PARTS, triton.cdiv(B * T, options["ROWS"]))
    grad_x, partial = torch.empty_like(total), total.new_empty((2, programs, C), dtype=torch.float32)
    if B:
        backward_kernel[(programs,)](
            total, weight, grad_total, grad_normed, grad_x, partial, B * T, C, eps, programs,
            KIND=kind, HAS_TOTAL=grad_total is not None, WEIGHT=weight is not None,
            BIAS=bias is not None, **options,
        )  # fmt: skip
    sums = [partial[i].sum(0).to(like.dtype) for i, like in enumerate((weight, bias)) if like is not None]
    return [grad_x, *sums]
