"""Flow head in Triton. The raw parameters never reach memory.

A program projects BLOCK_T consecutive tokens of one row and transforms the tokens that the parameters belong to. With
bfloat16 weights it reads h once, and applies the factor of the norm after the projection. This would lose digits in
float32 and exceed the range of float16. With these dtypes it reads h twice, the second time from cache. The backward
kernel recomputes the raw parameters.

For a token, let g be the gradient of its raw parameters and r the factor of its norm. Let w be the weight of the norm,
and G the sum over tokens of (r g) h^T, one matrix product. Then dL/dW = G (1 + w), and dL/dw is the sum of W G over
outputs. The gradient of the norm needs the mean of g times the parameters before the bias.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._core.numerics import NORM_EPS, accumulation_dtype
from .._triton.math import divide, log_sigma_slope, sigma_of, soft_clipped
from .._triton.runtime import contiguous, refuse_tensors
from .._triton.tiles import chip_of
from ..affine_flow.triton import sum_rows
from .tiles import WIDEST, config

RMS_EPS = tl.constexpr(NORM_EPS["rms_norm"])


@triton.jit
def _norm_factor(h, row, source, T, C, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return 1 / sqrt(mean h^2 + eps) of each token, (BLOCK_T,)."""
    # The sum is in float64, because an error of the factor would affect all parameters of the token.
    square = tl.zeros([BLOCK_T], tl.float64)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        # (BLOCK_T, BLOCK_C)
        x = tl.load(h + (row * T + source)[:, None] * C + c[None, :], (source < T)[:, None] & (c < C)[None, :], 0)
        x = x.to(tl.float32)
        square += tl.sum(x * x, 1)
    return (1 / tl.sqrt(square / C + RMS_EPS)).to(tl.float32)


@triton.jit
def _add_product(x, y, total, lost):
    """Return total + x y, and its rounding error for the next call as `lost`; only float32 is compensated."""
    if x.dtype == tl.float32:
        product = tl.dot(x, y, input_precision="ieee") - lost  # (BLOCK_T, BLOCK_D)
        grown = total + product
        return grown, (grown - total) - product
    return tl.dot(x, y, total), lost  # (BLOCK_T, BLOCK_D)


@triton.jit
def _raw(
    h, weight, bias, norm_weight, row, source, T, C, D, clip,
    SCALE: tl.constexpr, CLIPPED: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return each token's raw a and b before bias and clip, a and b after them, and the factor of its norm."""
    out = tl.arange(0, BLOCK_D)
    a = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    b = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    lost_a, lost_b = a, b
    factor = tl.full([BLOCK_T], 1.0, tl.float32)
    square = tl.zeros([BLOCK_T], tl.float32)
    skip = 0 if SCALE == "unit" else D
    EXACT: tl.constexpr = weight.dtype.element_ty == tl.float32
    NORM_FIRST: tl.constexpr = NORM and weight.dtype.element_ty != tl.bfloat16
    if NORM_FIRST:
        factor = _norm_factor(h, row, source, T, C, BLOCK_T, BLOCK_C)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        mask = (out < D)[None, :] & (c < C)[:, None]
        # (BLOCK_T, BLOCK_C)
        x = tl.load(h + (row * T + source)[:, None] * C + c[None, :], (source < T)[:, None] & (c < C)[None, :], 0)
        if NORM:
            wide = x.to(tl.float32) * factor[:, None]
            square += tl.sum(wide * wide, 1)
            x = wide * (1 + tl.load(norm_weight + c, c < C, 0).to(tl.float32))[None, :]  # (BLOCK_T, BLOCK_C)
        weight_b = tl.load(weight + (skip + out)[None, :] * C + c[:, None], mask, 0)  # (BLOCK_C, BLOCK_D)
        x = x.to(weight_b.dtype)
        b, lost_b = _add_product(x, weight_b, b, lost_b)  # (BLOCK_T, BLOCK_D)
        if SCALE != "unit":
            weight_a = tl.load(weight + out[None, :] * C + c[:, None], mask, 0)  # (BLOCK_C, BLOCK_D)
            a, lost_a = _add_product(x, weight_a, a, lost_a)  # (BLOCK_T, BLOCK_D)
    if NORM and not NORM_FIRST:
        factor = tl.rsqrt(square / C + RMS_EPS)
        a *= factor[:, None]
        b *= factor[:, None]
    raw_a, raw_b = a, b
    if BIAS:
        raw_b += tl.load(bias + skip + out, out < D, 0).to(tl.float32)[None, :]  # (1, BLOCK_D)
        if SCALE != "unit":
            raw_a += tl.load(bias + out, out < D, 0).to(tl.float32)[None, :]  # (1, BLOCK_D)
    return a, b, soft_clipped(raw_a, clip, CLIPPED, EXACT), soft_clipped(raw_b, clip, CLIPPED, EXACT), factor


@triton.jit
def target_tokens(source, T, SHIFT: tl.constexpr, FLIP: tl.constexpr):
    """Return whether the parameters at each source position belong to a token, and to which token.

    The parameters at the last source position of a shifted row belong to no token. Its entry is the token that passes
    unchanged.
    """
    token = source + 1 if SHIFT else source
    known = (token < T) & (source < T)
    token = tl.where(token < T, token, 0)
    return known, T - 1 - token if FLIP else token


@triton.jit(do_not_specialize=("T",))
def flow_head_forward_kernel(
    x, h, weight, bias, norm_weight, z, logdet, T, C, D, clip,
    SCALE: tl.constexpr, CLIPPED: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr,
    SHIFT: tl.constexpr, FLIP: tl.constexpr, SUM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store z, and either -log sigma per element or the sum of log sigma over the program's tokens."""
    blocks = tl.cdiv(T, BLOCK_T)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    source = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    _, _, a, b, _ = _raw(h, weight, bias, norm_weight, row, source, T, C, D, clip, SCALE, CLIPPED, BIAS, NORM,
                         BLOCK_T, BLOCK_C, BLOCK_D)  # fmt: skip
    EXACT: tl.constexpr = weight.dtype.element_ty == tl.float32
    known, token = target_tokens(source, T, SHIFT, FLIP)
    out = tl.arange(0, BLOCK_D)
    sigma, log_sigma = sigma_of(a, SCALE, EXACT)
    inside = (source < T)[:, None] & (out < D)[None, :]
    transformed = known[:, None] & (out < D)[None, :]
    offsets = (row * T + token)[:, None] * D + out[None, :]
    value = tl.load(x + offsets, inside, 0).to(tl.float32)  # (BLOCK_T, BLOCK_D)
    tl.store(z + offsets, tl.where(transformed, divide(value - b, sigma, EXACT), value), inside)
    log_sigma = tl.where(transformed, log_sigma, 0.0)
    if SUM:
        tl.store(logdet + tl.program_id(0), tl.sum(log_sigma))
    else:
        tl.store(logdet + offsets, 0.0 - log_sigma, inside)


@triton.jit
def flow_head_backward_kernel(
    x, h, weight, bias, norm_weight, z, grad_z, grad_logdet, grad_x, grad_h, grad_raw, scaled, T, C, D, clip, share,
    SCALE: tl.constexpr, CLIPPED: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr,
    SHIFT: tl.constexpr, FLIP: tl.constexpr, SUM: tl.constexpr, HAS_Z: tl.constexpr, HAS_LOGDET: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store the gradients of x, h and the raw parameters; store the last also times the factor of the norm."""
    blocks = tl.cdiv(T, BLOCK_T)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    source = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    linear_a, linear_b, a, b, factor = _raw(h, weight, bias, norm_weight, row, source, T, C, D, clip, SCALE, CLIPPED,
                                          BIAS, NORM, BLOCK_T, BLOCK_C, BLOCK_D)  # fmt: skip
    EXACT: tl.constexpr = weight.dtype.element_ty == tl.float32
    known, token = target_tokens(source, T, SHIFT, FLIP)
    out = tl.arange(0, BLOCK_D)
    inside = (source < T)[:, None] & (out < D)[None, :]
    transformed = known[:, None] & (out < D)[None, :]
    offsets = (row * T + token)[:, None] * D + out[None, :]
    sigma, _ = sigma_of(a, SCALE, EXACT)
    g = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    slope = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    if HAS_Z:
        g += tl.load(grad_z + offsets, inside, 0).to(tl.float32)  # (BLOCK_T, BLOCK_D)
    if HAS_LOGDET:
        # (BLOCK_T, BLOCK_D), or the same value for all
        slope += tl.load(grad_logdet + row) * share if SUM else tl.load(grad_logdet + offsets, inside, 0)
    # Where the gradient of z is zero, z contributes nothing, even if z or 1 / sigma is infinite.
    live = transformed & (g != 0)
    noise = tl.load(z + offsets, live, 0).to(tl.float32)  # (BLOCK_T, BLOCK_D)
    g_x = tl.where(live, divide(g, sigma, EXACT), g)
    tl.store(grad_x + offsets, g_x, inside)
    g_b = tl.where(transformed, 0.0 - g_x, 0.0)
    g_a = (g * noise + slope) * log_sigma_slope(a, sigma, SCALE, EXACT)
    g_a = tl.where(transformed, 0.0 - g_a, 0.0)
    if CLIPPED:
        g_a *= 1 - (a / clip) * (a / clip)
        g_b *= 1 - (b / clip) * (b / clip)
    skip = 0 if SCALE == "unit" else D
    raw_offsets = (row * T + source)[:, None] * (skip + D) + skip + out[None, :]
    tl.store(grad_raw + raw_offsets, g_b, inside)
    tl.store(scaled + raw_offsets, g_b * factor[:, None], inside)
    mean = tl.sum(g_b * linear_b, 1)
    if SCALE != "unit":
        tl.store(grad_raw + raw_offsets - D, g_a, inside)
        tl.store(scaled + raw_offsets - D, g_a * factor[:, None], inside)
        mean += tl.sum(g_a * linear_a, 1)
    mean = mean * factor * factor / C
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        mask = (out < D)[:, None] & (c < C)[None, :]
        h_mask = (source < T)[:, None] & (c < C)[None, :]
        weight_b = tl.load(weight + (skip + out)[:, None] * C + c[None, :], mask, 0)  # (BLOCK_D, BLOCK_C)
        g_h = tl.dot(g_b.to(weight_b.dtype), weight_b, input_precision="ieee")  # (BLOCK_T, BLOCK_C)
        if SCALE != "unit":
            weight_a = tl.load(weight + out[:, None] * C + c[None, :], mask, 0)  # (BLOCK_D, BLOCK_C)
            g_h = tl.dot(g_a.to(weight_a.dtype), weight_a, g_h, input_precision="ieee")  # (BLOCK_T, BLOCK_C)
        h_offsets = (row * T + source)[:, None] * C + c[None, :]
        if NORM:
            g_h *= (1 + tl.load(norm_weight + c, c < C, 0).to(tl.float32))[None, :] * factor[:, None]
            g_h -= tl.load(h + h_offsets, h_mask, 0).to(tl.float32) * mean[:, None]  # (BLOCK_T, BLOCK_C)
        tl.store(grad_h + h_offsets, g_h, h_mask)


def refuse(x, h, weight, *others) -> str | None:
    """Return why the kernels cannot take these arguments, or None."""
    if x.shape[2] > WIDEST:
        return f"tokens of {x.shape[2]} values, it takes up to {WIDEST}"
    if weight.shape[0] * max(x.shape[0], 1) * x.shape[1] >= 2**31:
        return "it takes fewer than 2^31 raw parameters"
    return refuse_tensors(x, h, weight, *others[:2])


def refuse_backward(grads, outputs, *args) -> str | None:
    """Return why the backward kernels cannot take these arguments, or None."""
    return refuse(*args)


def _sum_over_tokens(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a^T b. In float32 it adds 16 partial sums, because one chain of sums over all tokens would lose digits."""
    if a.dtype != torch.float32:
        return a.T @ b
    part = max(1, len(a) // 16)
    whole = len(a) // part * part
    parts = a[:whole].view(-1, part, a.shape[1]).mT @ b[:whole].view(-1, part, b.shape[1])
    return parts.sum(0) + a[whole:].T @ b[whole:]


def _options(D, weight, bias, norm_weight, scale, soft_clip, shift, flip, logdet) -> dict:
    return {
        "SCALE": scale, "CLIPPED": soft_clip > 0, "BIAS": bias is not None, "NORM": norm_weight is not None,
        "SHIFT": shift, "FLIP": flip, "SUM": logdet != "none", **config(D, weight.dtype, chip_of(weight.device)),
    }  # fmt: skip


def flow_head(x, h, weight, bias, norm_weight, *options) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.flow_head."""
    (B, T, D), C = x.shape, h.shape[2]
    constants = _options(D, weight, bias, norm_weight, *options)
    x, h, weight, bias, norm_weight = contiguous(x, h, weight, bias, norm_weight)
    z, blocks = torch.empty_like(x), triton.cdiv(T, constants["BLOCK_T"])
    partial = x.new_empty((B, blocks) if constants["SUM"] else x.shape, dtype=torch.float32)
    if B:
        flow_head_forward_kernel[(B * blocks,)](
            x, h, weight, bias, norm_weight, z, partial, T, C, D, options[1], **constants
        )
    return z, sum_rows(partial, options[-1], T * D) if constants["SUM"] else partial


def flow_head_backward(grads, outputs, x, h, weight, bias, norm_weight, *options) -> list[torch.Tensor]:
    """See reference.flow_head_backward."""
    (B, T, D), C = x.shape, h.shape[2]
    constants = _options(D, weight, bias, norm_weight, *options)
    x, h, weight, bias, norm_weight, z, *grads = contiguous(x, h, weight, bias, norm_weight, outputs[0], *grads)
    grad_x, grad_h = torch.empty_like(x), torch.empty_like(h)
    grad_raw, scaled = weight.new_empty((2, B * T, weight.shape[0]), dtype=torch.float32)
    if B:
        flow_head_backward_kernel[(B * triton.cdiv(T, constants["BLOCK_T"]),)](
            x, h, weight, bias, norm_weight, z, *grads, grad_x, grad_h, grad_raw, scaled, T, C, D, options[1],
            1.0 if options[-1] == "sum" else 1.0 / (T * D),
            HAS_Z=grads[0] is not None, HAS_LOGDET=grads[1] is not None, **constants,
        )  # fmt: skip
    wide = accumulation_dtype(h.dtype)
    product = _sum_over_tokens(scaled.to(h.dtype), h.flatten(0, 1))
    gradients, factor = [grad_x, grad_h, product], None if norm_weight is None else 1 + norm_weight.to(wide)
    if factor is not None:
        gradients[2] = product * factor
    if bias is not None:
        gradients.append(grad_raw.sum(0))
    if norm_weight is not None:
        gradients.append((product.to(wide) * weight.to(wide)).sum(0))
    inputs = (t for t in (x, h, weight, bias, norm_weight) if t is not None)
    return [grad.to(like.dtype) for grad, like in zip(gradients, inputs)]
