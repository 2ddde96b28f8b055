"""Affine flow transform in Triton: every tensor is read and written once.

A program takes BLOCK consecutive elements of one row. Log-determinants are partial sums of programs, added by a second
kernel; how a row is cut depends on T and D alone, so that its bits are the same in every batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._triton.math import log_sigma_slope, sigma_of, soft_clipped
from .._triton.runtime import refuse_tensors

CONFIG = {"BLOCK": 1024, "num_warps": 4}


@triton.jit
def _places(T, D, SHIFT: tl.constexpr, FLIP: tl.constexpr, BLOCK: tl.constexpr):
    """Row, first element of the row, which elements of it are this program's, its tokens' parameters, dimension."""
    chunks = tl.cdiv(T * D, BLOCK)
    row = (tl.program_id(0) // chunks).to(tl.int64)
    element = tl.program_id(0) % chunks * BLOCK + tl.arange(0, BLOCK)
    token = element // D
    source = (T - 1 - token if FLIP else token) - (1 if SHIFT else 0)
    return row, element, element < T * D, source, element % D


@triton.jit
def _transform(params, row, source, dimension, inside, T, D, clip, SCALE: tl.constexpr, CLIPPED: tl.constexpr):
    """Clipped a and b, sigma and log sigma of each element; the identity where a token has no parameters."""
    known = inside & (source >= 0)
    if SCALE == "unit":
        at = params + (row * T + source) * D + dimension
        b = soft_clipped(tl.load(at, known, 0).to(tl.float32), clip, CLIPPED)
        a = tl.zeros_like(b)
    else:
        at = params + (row * T + source) * 2 * D + dimension
        a = soft_clipped(tl.load(at, known, 0).to(tl.float32), clip, CLIPPED)
        b = soft_clipped(tl.load(at + D, known, 0).to(tl.float32), clip, CLIPPED)
    sigma, log_sigma = sigma_of(a, SCALE)
    return a, b, tl.where(known, sigma, 1.0), tl.where(known, log_sigma, 0.0)


@triton.jit
def forward_kernel(
    x, params, z, logdet, T, D, clip,
    SCALE: tl.constexpr, CLIPPED: tl.constexpr, SHIFT: tl.constexpr, FLIP: tl.constexpr, SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """z, and -log sigma of each element or the sum of log sigma over the program's."""
    row, element, inside, source, dimension = _places(T, D, SHIFT, FLIP, BLOCK)
    _, b, sigma, log_sigma = _transform(params, row, source, dimension, inside, T, D, clip, SCALE, CLIPPED)
    at = row * T * D + element
    tl.store(z + at, (tl.load(x + at, inside, 0).to(tl.float32) - b) / sigma, inside)
    if SUM:
        tl.store(logdet + tl.program_id(0), tl.sum(log_sigma))
    else:
        tl.store(logdet + at, 0.0 - log_sigma, inside)


@triton.jit
def sum_kernel(partial, logdet, chunks, factor, BLOCK: tl.constexpr):
    """logdet[row] = factor times the sum of the row's partial sums."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, chunks, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(partial + row * chunks + at, at < chunks, 0)
    tl.store(logdet + row, tl.sum(total) * factor)


@triton.jit
def backward_kernel(
    x, params, z, grad_z, grad_logdet, grad_x, grad_params, T, D, clip, factor,
    SCALE: tl.constexpr, CLIPPED: tl.constexpr, SHIFT: tl.constexpr, FLIP: tl.constexpr, SUM: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_LOGDET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients with respect to x and params, see reference.params_gradient."""
    row, element, inside, source, dimension = _places(T, D, SHIFT, FLIP, BLOCK)
    a, b, sigma, _ = _transform(params, row, source, dimension, inside, T, D, clip, SCALE, CLIPPED)
    at = row * T * D + element
    g = tl.load(grad_z + at, inside, 0).to(tl.float32) if HAS_Z else tl.zeros([BLOCK], tl.float32)
    of_l = tl.zeros([BLOCK], tl.float32)
    if HAS_LOGDET:
        of_l += tl.load(grad_logdet + row) * factor if SUM else tl.load(grad_logdet + at, inside, 0)
    to_x = g / sigma
    tl.store(grad_x + at, to_x, inside)
    # The last parameters of a shifted sequence belong to no token; the token without parameters clears them.
    known, target = source >= 0, tl.where(source >= 0, source, T - 1)
    to_b = tl.where(known, 0.0 - to_x, 0.0)
    if CLIPPED:
        to_b *= 1 - (b / clip) * (b / clip)
    if SCALE == "unit":
        tl.store(grad_params + (row * T + target) * D + dimension, to_b, inside)
    else:
        to_a = 0.0 - (g * tl.load(z + at, inside, 0).to(tl.float32) + of_l) * log_sigma_slope(a, sigma, SCALE)
        if CLIPPED:
            to_a *= 1 - (a / clip) * (a / clip)
        to = grad_params + (row * T + target) * 2 * D + dimension
        tl.store(to, tl.where(known, to_a, 0.0), inside)
        tl.store(to + D, to_b, inside)


def sum_rows(partial: torch.Tensor, logdet: str, elements: int) -> torch.Tensor:
    """Log-determinants (B,), a sum or a mean over `elements`, from partial sums (B, n) of log sigma."""
    out = partial.new_empty(len(partial))
    if len(out):
        factor = -1.0 if logdet == "sum" else -1.0 / elements
        sum_kernel[(len(out),)](partial, out, partial.shape[1], factor, BLOCK=1024)
    return out


def refuse(x, params, *others) -> str | None:
    """Why these arguments cannot run here, or None."""
    if x.numel() >= 2**31 or x.shape[0] * triton.cdiv(x[0].numel() if len(x) else 0, CONFIG["BLOCK"]) >= 2**31:
        return "it takes fewer than 2^31 values"
    return refuse_tensors(x, params)


def refuse_backward(grads, outputs, x, params, *others) -> str | None:
    """The same for the gradient."""
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
        forward_kernel[(B * chunks,)](x, params, z, partial, T, D, soft_clip, **options)
    return z, partial if logdet == "none" else sum_rows(partial, logdet, T * D)


def affine_flow_backward(grads, outputs, x, params, scale, soft_clip, shift, flip, logdet) -> list[torch.Tensor]:
    """See reference.affine_flow_backward."""
    grad_z, grad_logdet = (None if grad is None else grad.contiguous() for grad in grads)
    z, x, params = (t.contiguous() for t in (outputs[0], x, params))
    found = [torch.empty_like(x), torch.empty_like(params)]
    B, T, D = x.shape
    if B:
        backward_kernel[(B * triton.cdiv(T * D, CONFIG["BLOCK"]),)](
            x, params, z, grad_z, grad_logdet, *found, T, D, soft_clip, 1.0 if logdet == "sum" else 1.0 / (T * D),
            HAS_Z=grad_z is not None, HAS_LOGDET=grad_logdet is not None,
            **_options(scale, soft_clip, shift, flip, logdet),
        )  # fmt: skip
    return found
