"""Affine flow transform in Triton. Every tensor is read or written once.

A program takes BLOCK consecutive elements of one row. Each program stores its partial sum of the log-determinant, and a
second kernel adds these sums. The blocks of a row depend only on T and D, so a row has the same bits in every batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._triton.math import divide, log_sigma_slope, sigma_of, soft_clipped
from .._triton.runtime import refuse_tensors

CONFIG = {"BLOCK": 1024, "num_warps": 4}


@triton.jit
def _elements(T, D, SHIFT: tl.constexpr, FLIP: tl.constexpr, BLOCK: tl.constexpr):
    """Return this program's row, its elements, their mask, the tokens that hold their parameters, and dimensions."""
    chunks = tl.cdiv(T * D, BLOCK)
    row = (tl.program_id(0) // chunks).to(tl.int64)
    element = tl.program_id(0) % chunks * BLOCK + tl.arange(0, BLOCK)
    token = element // D
    source = (T - 1 - token if FLIP else token) - (1 if SHIFT else 0)
    return row, element, element < T * D, source, element % D


@triton.jit
def _transform(
    params, row, source, dimension, inside, T, D, clip,
    SCALE: tl.constexpr, CLIPPED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Return clipped a and b, sigma and log sigma per element. A token without parameters gets the identity."""
    known = inside & (source >= 0)
    if SCALE == "unit":
        offsets = (row * T + source) * D + dimension
        b = soft_clipped(tl.load(params + offsets, known, 0).to(tl.float32), clip, CLIPPED, EXACT)  # (BLOCK,)
        a = tl.zeros_like(b)
    else:
        offsets = (row * T + source) * 2 * D + dimension
        a = soft_clipped(tl.load(params + offsets, known, 0).to(tl.float32), clip, CLIPPED, EXACT)  # (BLOCK,)
        b = soft_clipped(tl.load(params + offsets + D, known, 0).to(tl.float32), clip, CLIPPED, EXACT)  # (BLOCK,)
    sigma, log_sigma = sigma_of(a, SCALE, EXACT)
    return a, b, tl.where(known, sigma, 1.0), tl.where(known, log_sigma, 0.0)


@triton.jit
def affine_flow_forward_kernel(
    x, raw, z, logdet, T, D, clip,
    SCALE: tl.constexpr, CLIPPED: tl.constexpr, SHIFT: tl.constexpr, FLIP: tl.constexpr, SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Store z, and either -log sigma per element or the program's sum of log sigma."""
    row, element, inside, source, dimension = _elements(T, D, SHIFT, FLIP, BLOCK)
    EXACT: tl.constexpr = x.dtype.element_ty == tl.float32
    _, b, sigma, log_sigma = _transform(raw, row, source, dimension, inside, T, D, clip, SCALE, CLIPPED, EXACT)
    offsets = row * T * D + element
    value = tl.load(x + offsets, inside, 0).to(tl.float32)  # (BLOCK,)
    tl.store(z + offsets, divide(value - b, sigma, EXACT), inside)
    if SUM:
        tl.store(logdet + tl.program_id(0), tl.sum(log_sigma))
    else:
        tl.store(logdet + offsets, 0.0 - log_sigma, inside)


@triton.jit(do_not_specialize=("chunks",))
def logdet_sum_kernel(partial, logdet, chunks, factor, BLOCK: tl.constexpr):
    """Store factor times the sum of a row's partial sums."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, chunks, BLOCK):
        chunk = start + tl.arange(0, BLOCK)
        total += tl.load(partial + row * chunks + chunk, chunk < chunks, 0)  # (BLOCK,)
    tl.store(logdet + row, tl.sum(total) * factor)


@triton.jit
def affine_flow_backward_kernel(
    x, raw, z, grad_z, grad_logdet, grad_x, grad_params, T, D, clip, factor,
    SCALE: tl.constexpr, CLIPPED: tl.constexpr, SHIFT: tl.constexpr, FLIP: tl.constexpr, SUM: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_LOGDET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the gradients with respect to x and raw; see reference.params_gradient.

    Where the gradient of z is zero, z contributes nothing, even if z or 1 / sigma is infinite.
    """
    row, element, inside, source, dimension = _elements(T, D, SHIFT, FLIP, BLOCK)
    EXACT: tl.constexpr = x.dtype.element_ty == tl.float32
    a, b, sigma, _ = _transform(raw, row, source, dimension, inside, T, D, clip, SCALE, CLIPPED, EXACT)
    offsets = row * T * D + element
    # (BLOCK,)
    g = tl.load(grad_z + offsets, inside, 0).to(tl.float32) if HAS_Z else tl.zeros([BLOCK], tl.float32)
    g_logdet = tl.zeros([BLOCK], tl.float32)
    if HAS_LOGDET:
        # (BLOCK,), or the same value for all
        g_logdet += tl.load(grad_logdet + row) * factor if SUM else tl.load(grad_logdet + offsets, inside, 0)
    g_x = tl.where(g == 0, 0.0, divide(g, sigma, EXACT))
    tl.store(grad_x + offsets, g_x, inside)
    # The last parameters of a shifted sequence belong to no token. The token without parameters zeroes their gradient.
    known, target = source >= 0, tl.where(source >= 0, source, T - 1)
    g_b = tl.where(known, 0.0 - g_x, 0.0)
    if CLIPPED:
        g_b *= 1 - (b / clip) * (b / clip)
    if SCALE == "unit":
        tl.store(grad_params + (row * T + target) * D + dimension, g_b, inside)
    else:
        noise = tl.load(z + offsets, inside & (g != 0), 0).to(tl.float32)  # (BLOCK,)
        g_a = 0.0 - (g * noise + g_logdet) * log_sigma_slope(a, sigma, SCALE, EXACT)
        if CLIPPED:
            g_a *= 1 - (a / clip) * (a / clip)
        target_offsets = (row * T + target) * 2 * D + dimension
        tl.store(grad_params + target_offsets, tl.where(known, g_a, 0.0), inside)
        tl.store(grad_params + target_offsets + D, g_b, inside)


def sum_rows(partial: torch.Tensor, logdet: str, elements: int) -> torch.Tensor:
    """Return log-determinants (B,) from partial sums (B, n) of log sigma: a sum, or a mean over `elements`."""
    out = partial.new_empty(len(partial))
    if len(out):
        factor = -1.0 if logdet == "sum" else -1.0 / elements
        logdet_sum_kernel[(len(out),)](partial, out, partial.shape[1], factor, BLOCK=1024)
    return out


def refuse(x, params, *others) -> str | None:
    """Return why the kernels cannot take these arguments, or None."""
    if x.numel() >= 2**31 or x.shape[0] * triton.cdiv(x[0].numel() if len(x) else 0, CONFIG["BLOCK"]) >= 2**31:
        return "it takes fewer than 2^31 values"
    return refuse_tensors(x, params)


def refuse_backward(grads, outputs, x, params, *others) -> str | None:
    """Return why the backward kernels cannot take these arguments, or None."""
    return refuse(x, params)


def _options(scale: str, soft_clip: float, shift: bool, flip: bool, logdet: str) -> dict:
    return {
        "SCALE": scale, "CLIPPED": soft_clip > 0, "SHIFT": shift, "FLIP": flip, "SUM": logdet != "none", **CONFIG,
    }  # fmt: skip


def affine_flow(x, params, scale, soft_clip, shift, flip, logdet) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.affine_flow."""
    x, params = x.contiguous(), params.contiguous()
    B, T, D = x.shape
    z, chunks = torch.empty_like(x), triton.cdiv(T * D, CONFIG["BLOCK"])
    partial = x.new_empty((B, chunks) if logdet != "none" else x.shape, dtype=torch.float32)
    if B:
        options = _options(scale, soft_clip, shift, flip, logdet)
        affine_flow_forward_kernel[(B * chunks,)](x, params, z, partial, T, D, soft_clip, **options)
    return z, partial if logdet == "none" else sum_rows(partial, logdet, T * D)


def affine_flow_backward(grads, outputs, x, params, scale, soft_clip, shift, flip, logdet) -> list[torch.Tensor]:
    """See reference.affine_flow_backward."""
    grad_z, grad_logdet = (None if grad is None else grad.contiguous() for grad in grads)
    z, x, params = (t.contiguous() for t in (outputs[0], x, params))
    gradients = [torch.empty_like(x), torch.empty_like(params)]
    B, T, D = x.shape
    if B:
        affine_flow_backward_kernel[(B * triton.cdiv(T * D, CONFIG["BLOCK"]),)](
            x, params, z, grad_z, grad_logdet, *gradients, T, D, soft_clip, 1.0 if logdet == "sum" else 1.0 / (T * D),
            HAS_Z=grad_z is not None, HAS_LOGDET=grad_logdet is not None,
            **_options(scale, soft_clip, shift, flip, logdet),
        )  # fmt: skip
    return gradients
