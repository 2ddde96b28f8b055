"""Attention flow in Triton. The forward pass writes neither the attention output nor the raw parameters to memory.

A program takes BLOCK_M tokens of one row through every head and adds the projections of the heads. The backward pass
recomputes the attention output and the raw parameters. It stores the gradients g of the raw parameters and the
attention output, whose product is the gradient of the weight W.

The gradient of the output of head h is g W_h. The kernel for the keys instead takes V W_h^T as the values and g as the
gradient of the output, so that dV = (P^T g) W_h.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._core.numerics import last_dim_contiguous
from .._triton.math import divide, log_sigma_slope, sigma_of, soft_clipped
from .._triton.rotary import (
    angles,
    apply_rotary,
    block_head_row,
    half_tile,
    load_pair,
    load_rows,
    row_pointers,
    store_pair,
    strides,
)
from .._triton.runtime import refuse_tensors
from .._triton.tiles import config
from ..affine_flow.triton import sum_rows
from ..causal_attention.triton import (
    LN_2,
    LOG2_E,
    add_to_keys,
    add_to_queries,
    attend,
    key_bounds,
    score_factor,
    shared_constants,
)
from ..flow_head.triton import target_tokens

# Bytes per value -> (widest token, widest head). float32 has lower limits: its products keep operands in registers.
WIDEST = {2: (64, 128), 4: (32, 64)}
# Raw parameters of a token, or values of a head, per step of a product with the weight.
CHUNK = tl.constexpr(16)


@triton.jit
def _raw(
    q, k, v, cos, sin, weight, bias, out, lse, query, row, T, H, group, D, window, factor, clip,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    FORWARD: tl.constexpr, WINDOW: tl.constexpr, HEAD: tl.constexpr, HALF: tl.constexpr, ROTARY: tl.constexpr,
    SCALE: tl.constexpr, CLIPPED: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return clipped raw a and b of BLOCK_M tokens. Stores the log-sum-exp if FORWARD, else the attention output."""
    dims = tl.arange(0, BLOCK_D)
    inner = tl.arange(0, 2 * HALF)
    queries = query + tl.arange(0, BLOCK_M)
    skip = 0 if SCALE == "unit" else D
    a = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    bounds = key_bounds(query, T, window, WINDOW, BLOCK_M, BLOCK_N)
    for number in range(0, H):
        head = tl.cast(number, tl.int64)
        q_start = q + row * q_row + head * q_head
        k_start = k + row * k_row + head // group * k_head
        v_start = v + row * v_row + head // group * v_head
        # (BLOCK_M, HALF) each
        q1, q2 = load_pair(q_start, q_token, cos, sin, query, T, HEAD, HALF, ROTARY, BLOCK_M)
        acc = tl.zeros([BLOCK_M, 2 * HALF], tl.float32)
        total, top = tl.zeros([BLOCK_M], tl.float32), tl.full([BLOCK_M], float("-inf"), tl.float32)
        for masked in tl.static_range(1 if WINDOW else 0, 2):
            acc, total, top = attend(
                acc, total, top, q1, q2, k_start, v_start, k_token, v_token, query,
                bounds[0 if WINDOW else 1 + masked], bounds[2 + masked], T, window, factor, masked,
                WINDOW, HEAD, HALF, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        h = (acc / total[:, None]).to(q1.dtype)
        if FORWARD:
            tl.store(lse + (row * H + head) * T + queries, (top + tl.log2(total)) * LN_2, queries < T)
        else:
            target = out + (row * T * H + head) * HEAD
            pointers, inside = row_pointers(target, H * HEAD, query, T, HEAD, 2 * HALF, BLOCK_M)
            tl.store(pointers, h, inside)
        mask = (dims < D)[None, :] & (inner < HEAD)[:, None]
        weight_pointers = weight + head * HEAD + (dims[None, :] * (H * HEAD) + inner[:, None])
        weight_b = tl.load(weight_pointers + skip * H * HEAD, mask, 0)  # (2 HALF, BLOCK_D)
        b = tl.dot(h, weight_b, b, input_precision="ieee")  # (BLOCK_M, BLOCK_D)
        if SCALE != "unit":
            weight_a = tl.load(weight_pointers, mask, 0)  # (2 HALF, BLOCK_D)
            a = tl.dot(h, weight_a, a, input_precision="ieee")  # (BLOCK_M, BLOCK_D)
    if BIAS:
        b += tl.load(bias + skip + dims, dims < D, 0).to(tl.float32)[None, :]  # (1, BLOCK_D)
        if SCALE != "unit":
            a += tl.load(bias + dims, dims < D, 0).to(tl.float32)[None, :]  # (1, BLOCK_D)
    EXACT: tl.constexpr = weight.dtype.element_ty == tl.float32
    return soft_clipped(a, clip, CLIPPED, EXACT), soft_clipped(b, clip, CLIPPED, EXACT)


@triton.jit(do_not_specialize=("H", "group", "window"))
def attention_flow_forward_kernel(
    x, q, k, v, cos, sin, weight, bias, z, logdet, lse, T, H, group, D, window, factor, clip,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    WINDOW: tl.constexpr, HEAD: tl.constexpr, HALF: tl.constexpr, ROTARY: tl.constexpr,
    SCALE: tl.constexpr, CLIPPED: tl.constexpr, BIAS: tl.constexpr,
    SHIFT: tl.constexpr, FLIP: tl.constexpr, SUM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store z, and either -log sigma per element or the sum of log sigma over the program's tokens."""
    block, _, row = block_head_row(tl.cdiv(T, BLOCK_M), 1)
    # The queries that see the most keys start first.
    query = (tl.cdiv(T, BLOCK_M) - 1 - block) * BLOCK_M
    a, b = _raw(
        q, k, v, cos, sin, weight, bias, None, lse, query, row, T, H, group, D, window, factor, clip,
        q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
        True, WINDOW, HEAD, HALF, ROTARY, SCALE, CLIPPED, BIAS, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    source, dims = query + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    known, token = target_tokens(source, T, SHIFT, FLIP)
    EXACT: tl.constexpr = weight.dtype.element_ty == tl.float32
    sigma, log_sigma = sigma_of(a, SCALE, EXACT)
    inside = (source < T)[:, None] & (dims < D)[None, :]
    transformed = known[:, None] & (dims < D)[None, :]
    offsets = (row * T + token)[:, None] * D + dims[None, :]
    value = tl.load(x + offsets, inside, 0).to(tl.float32)  # (BLOCK_M, BLOCK_D)
    tl.store(z + offsets, tl.where(transformed, divide(value - b, sigma, EXACT), value), inside)
    log_sigma = tl.where(transformed, log_sigma, 0.0)
    if SUM:
        tl.store(logdet + tl.program_id(0), tl.sum(log_sigma))
    else:
        tl.store(logdet + offsets, 0.0 - log_sigma, inside)


@triton.jit(do_not_specialize=("H", "group", "window"))
def attention_flow_raw_kernel(
    q, k, v, weight, bias, out, z, grad_z, grad_logdet, grad_x, grad_raw,
    T, H, group, D, window, factor, clip, share,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    WINDOW: tl.constexpr, HEAD: tl.constexpr, HALF: tl.constexpr,
    SCALE: tl.constexpr, CLIPPED: tl.constexpr, BIAS: tl.constexpr,
    SHIFT: tl.constexpr, FLIP: tl.constexpr, SUM: tl.constexpr, HAS_Z: tl.constexpr, HAS_LOGDET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store the gradients of x and the raw parameters, and the attention output."""
    block, _, row = block_head_row(tl.cdiv(T, BLOCK_M), 1)
    query = (tl.cdiv(T, BLOCK_M) - 1 - block) * BLOCK_M
    a, b = _raw(
        q, k, v, None, None, weight, bias, out, None, query, row, T, H, group, D, window, factor, clip,
        q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
        False, WINDOW, HEAD, HALF, "none", SCALE, CLIPPED, BIAS, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    source, dims = query + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    known, token = target_tokens(source, T, SHIFT, FLIP)
    EXACT: tl.constexpr = weight.dtype.element_ty == tl.float32
    sigma, _ = sigma_of(a, SCALE, EXACT)
    inside = (source < T)[:, None] & (dims < D)[None, :]
    transformed = known[:, None] & (dims < D)[None, :]
    offsets = (row * T + token)[:, None] * D + dims[None, :]
    g = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    slope = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if HAS_Z:
        g += tl.load(grad_z + offsets, inside, 0).to(tl.float32)  # (BLOCK_M, BLOCK_D)
    if HAS_LOGDET:
        # (BLOCK_M, BLOCK_D), or the same value for all
        slope += tl.load(grad_logdet + row) * share if SUM else tl.load(grad_logdet + offsets, inside, 0)
    # Where the gradient of z is zero, z contributes nothing, even if z or 1 / sigma is infinite.
    g_x = tl.where(transformed & (g != 0), divide(g, sigma, EXACT), g)
    tl.store(grad_x + offsets, g_x, inside)
    g_b = tl.where(transformed, 0.0 - g_x, 0.0)
    if CLIPPED:
        g_b *= 1 - (b / clip) * (b / clip)
    skip = 0 if SCALE == "unit" else D
    pointers = grad_raw + ((row * T + source)[:, None] * (skip + D) + skip + dims[None, :])
    tl.store(pointers, g_b, inside)
    if SCALE != "unit":
        noise = tl.load(z + offsets, inside & (g != 0), 0).to(tl.float32)  # (BLOCK_M, BLOCK_D)
        g_a = (g * noise + slope) * log_sigma_slope(a, sigma, SCALE, EXACT)
        g_a = tl.where(transformed, 0.0 - g_a, 0.0)
        if CLIPPED:
            g_a *= 1 - (a / clip) * (a / clip)
        tl.store(pointers - D, g_a, inside)


@triton.jit(do_not_specialize=("H", "group", "window"))
def attention_flow_queries_kernel(
    q, k, v, cos, sin, weight, out, grad_raw, grad_lse, lse, delta, grad_q, T, H, group, P, window, factor, scale,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    HAS_LSE: tl.constexpr, WINDOW: tl.constexpr, HEAD: tl.constexpr, HALF: tl.constexpr,
    ROTARY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store dq of BLOCK_M queries of one head, and their delta = rowsum(dO * O) - dlse."""
    block, head, row = block_head_row(tl.cdiv(T, BLOCK_M), H)
    query = (tl.cdiv(T, BLOCK_M) - 1 - block) * BLOCK_M
    queries, lse_offset = query + tl.arange(0, BLOCK_M), (row * H + head) * T
    g = tl.zeros([BLOCK_M, 2 * HALF], tl.float32)
    for start in range(0, P, CHUNK):
        g_raw = load_rows(grad_raw + row * T * P + start, P, query, T, P - start, CHUNK, BLOCK_M)  # (BLOCK_M, CHUNK)
        weight_h = load_rows(weight + head * HEAD, H * HEAD, start, P, HEAD, 2 * HALF, CHUNK)  # (CHUNK, 2 HALF)
        g = tl.dot(g_raw.to(weight_h.dtype), weight_h, g, input_precision="ieee")  # (BLOCK_M, 2 HALF)
    g = g.to(q.dtype.element_ty)
    # (BLOCK_M, 2 HALF)
    o = load_rows(out + (row * T * H + head) * HEAD, H * HEAD, query, T, HEAD, 2 * HALF, BLOCK_M)
    counts = score_factor(queries, T, window, WINDOW)
    deltas = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1) * counts
    if HAS_LSE:
        deltas -= tl.load(grad_lse + lse_offset + queries, queries < T, 0)  # (BLOCK_M,)
    tl.store(delta + lse_offset + queries, deltas, queries < T)
    k += row * k_row + head // group * k_head
    v += row * v_row + head // group * v_head
    # (BLOCK_M, HALF) each
    q1, q2 = load_pair(q + row * q_row + head * q_head, q_token, None, None, query, T, HEAD, HALF, "none", BLOCK_M)
    # (BLOCK_M,)
    lse_2 = tl.where(counts > 0, tl.load(lse + lse_offset + queries, queries < T, float("inf")) * LOG2_E, 0.0)
    dq1, dq2 = tl.zeros([BLOCK_M, HALF], tl.float32), tl.zeros([BLOCK_M, HALF], tl.float32)
    bounds = key_bounds(query, T, window, WINDOW, BLOCK_M, BLOCK_N)
    for masked in tl.static_range(1 if WINDOW else 0, 2):
        dq1, dq2 = add_to_queries(
            dq1, dq2, q1, q2, g, counts, lse_2, deltas, k, v, k_token, v_token, query,
            bounds[0 if WINDOW else 1 + masked], bounds[2 + masked], T, window, factor, masked,
            WINDOW, HEAD, HALF, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    target = grad_q + (row * T * H + head) * HEAD
    store_pair(target, H * HEAD, cos, sin, query, T, dq1 * scale, dq2 * scale, HEAD, HALF, ROTARY, BLOCK_M)


@triton.jit(do_not_specialize=("H", "group", "window"))
def attention_flow_keys_kernel(
    q, k, v, cos, sin, weight, grad_raw, lse, delta, grad_k, grad_v, T, H, group, P, window, factor, scale,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    WINDOW: tl.constexpr, HEAD: tl.constexpr, HALF: tl.constexpr, ROTARY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Store dk and dv of BLOCK_N keys of one key head, over the query heads of its group."""
    heads = H // group
    block, kv_head, row = block_head_row(tl.cdiv(T, BLOCK_N), heads)
    key, out = block * BLOCK_N, tl.arange(0, BLOCK_P)
    # (BLOCK_N, HALF) each
    k1, k2 = load_pair(k + row * k_row + kv_head * k_head, k_token, None, None, key, T, HEAD, HALF, "none", BLOCK_N)
    dk1, dk2 = tl.zeros([BLOCK_N, HALF], tl.float32), tl.zeros([BLOCK_N, HALF], tl.float32)
    dv = tl.zeros([BLOCK_N, 2 * HALF], tl.float32)
    stop = tl.minimum(key + BLOCK_N + window - 1, T) if WINDOW else T
    for member in range(0, group):
        head = kv_head * group + member
        value = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
        for start in range(0, HEAD, CHUNK):
            v_start = v + row * v_row + kv_head * v_head + start
            v_chunk = load_rows(v_start, v_token, key, T, HEAD - start, CHUNK, BLOCK_N)  # (BLOCK_N, CHUNK)
            inner = start + tl.arange(0, CHUNK)
            pointers = weight + head * HEAD + (out[None, :] * (H * HEAD) + inner[:, None])
            mask = (out < P)[None, :] & (inner < HEAD)[:, None]
            weight_h = tl.load(pointers, mask, 0)  # (CHUNK, BLOCK_P)
            value = tl.dot(v_chunk, weight_h, value, input_precision="ieee")  # (BLOCK_N, BLOCK_P)
        lse_offset = (row * H + head) * T
        g = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
        dk1, dk2, g = add_to_keys(
            dk1, dk2, g, k1, k2, value.to(k1.dtype), q + row * q_row + head * q_head, grad_raw + row * T * P,
            lse + lse_offset, delta + lse_offset, q_token, P, key, key, stop, T, window, factor, P, WINDOW, HEAD, HALF,
            BLOCK_P, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        weight_h = load_rows(weight + head * HEAD, H * HEAD, 0, P, HEAD, 2 * HALF, BLOCK_P)  # (BLOCK_P, 2 HALF)
        dv = tl.dot(g.to(weight_h.dtype), weight_h, dv, input_precision="ieee")  # (BLOCK_N, 2 HALF)
    offset = (row * T * heads + kv_head) * HEAD
    store_pair(grad_k + offset, heads * HEAD, cos, sin, key, T, dk1 * scale, dk2 * scale, HEAD, HALF, ROTARY, BLOCK_N)
    pointers, mask = row_pointers(grad_v + offset, heads * HEAD, key, T, HEAD, 2 * HALF, BLOCK_N)
    tl.store(pointers, dv, mask)


def _tile(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def refuse(x, q, k, v, weight, bias, *others) -> str | None:
    """Return why the kernels cannot take these arguments, or None."""
    if reason := refuse_tensors(x, q, k, v, weight, bias):
        return reason
    for name, size, widest in zip(("tokens", "heads"), (x.shape[2], q.shape[3]), WIDEST[q.element_size()]):
        if size > widest:
            return f"{name} of {size} values, it takes up to {widest} with {q.dtype}"
    B, T, H, _ = q.shape
    if B * T * max(H, weight.shape[0]) >= 2**31:
        return "it takes fewer than 2^31 queries and raw parameters"
    return None


def refuse_backward(grads, outputs, *args) -> str | None:
    """Return why the backward kernels cannot take these arguments, or None."""
    return refuse(*args)


def _flow_constants(D: int, bias, scale, soft_clip, shift, flip, logdet) -> dict:
    return {
        "SCALE": scale, "CLIPPED": soft_clip > 0, "BIAS": bias is not None, "SHIFT": shift, "FLIP": flip,
        "SUM": logdet != "none", "BLOCK_D": _tile(D),
    }  # fmt: skip


def attention_flow(x, q, k, v, weight, bias, cos, sin, rotary, window, temperature, *options):
    """See reference.attention_flow."""
    (B, T, H, d), D, group = q.shape, x.shape[2], q.shape[2] // k.shape[2]
    x, weight, bias = (None if t is None else t.contiguous() for t in (x, weight, bias))
    (q, k, v), (cos, sin) = last_dim_contiguous(q, k, v), angles(cos, sin)
    constants, flow = shared_constants(T, d, rotary, window), _flow_constants(D, bias, *options)
    blocks = config("attention_flow", "forward", q, half_tile(d))
    z, lse = torch.empty_like(x), q.new_empty((B, H, T), dtype=torch.float32)
    count = triton.cdiv(T, blocks["BLOCK_M"])
    partial = x.new_empty((B, count) if flow["SUM"] else x.shape, dtype=torch.float32)
    if B:
        k = apply_rotary(k, cos, sin, rotary)
        attention_flow_forward_kernel[(B * count,)](
            x, q, k, v, cos, sin, weight, bias, z, partial, lse, T, H, group, D, window,
            d**-0.5 / temperature * LOG2_E.value, options[1], *strides(q, k, v), **constants, **flow, **blocks,
        )  # fmt: skip
    return z, sum_rows(partial, options[-1], T * D) if flow["SUM"] else partial, lse


def attention_flow_backward(
    grads, outputs, x, q, k, v, weight, bias, cos, sin, rotary, window, temperature, *options
) -> list[torch.Tensor]:
    """See reference.attention_flow_backward."""
    (B, T, H, d), D, P, half = q.shape, x.shape[2], weight.shape[0], half_tile(q.shape[3])
    grad_z, grad_logdet, grad_lse, z, lse, weight, bias = (
        None if t is None else t.contiguous() for t in (*grads, outputs[0], outputs[2], weight, bias)
    )
    (q, k, v), (cos, sin) = last_dim_contiguous(q, k, v), angles(cos, sin)
    grad_x, grad_q, grad_k, grad_v = (t.new_empty(t.shape) for t in (x, q, k, v))
    out, grad_raw = q.new_empty(q.shape), x.new_empty((B, T, P), dtype=torch.float32)
    if B:
        q, k = (apply_rotary(t, cos, sin, rotary) for t in (q, k))
        scale, delta = d**-0.5 / temperature, torch.empty_like(lse)
        factor, all_strides = scale * LOG2_E.value, strides(q, k, v)
        constants, flow = shared_constants(T, d, rotary, window), _flow_constants(D, bias, *options)
        without_rotary = {name: value for name, value in constants.items() if name != "ROTARY"}
        blocks = config("attention_flow", "forward", q, half)
        attention_flow_raw_kernel[(B * triton.cdiv(T, blocks["BLOCK_M"]),)](
            q, k, v, weight, bias, out, z, grad_z, grad_logdet, grad_x, grad_raw, T, H, H // k.shape[2], D, window,
            factor, options[1], 1.0 if options[-1] == "sum" else 1.0 / (T * D), *all_strides,
            HAS_Z=grad_z is not None, HAS_LOGDET=grad_logdet is not None, **without_rotary, **flow, **blocks,
        )  # fmt: skip
        sizes = T, H, H // k.shape[2], P, window, factor, scale, *all_strides
        blocks = config("attention_flow", "queries", q, half)
        attention_flow_queries_kernel[(B * H * triton.cdiv(T, blocks["BLOCK_M"]),)](
            q, k, v, cos, sin, weight, out, grad_raw, grad_lse, lse, delta, grad_q, *sizes,
            HAS_LSE=grad_lse is not None, **constants, **blocks,
        )  # fmt: skip
        blocks = config("attention_flow", "keys", q, half)
        attention_flow_keys_kernel[(B * k.shape[2] * triton.cdiv(T, blocks["BLOCK_N"]),)](
            q, k, v, cos, sin, weight, grad_raw, lse, delta, grad_k, grad_v, *sizes,
            BLOCK_P=_tile(P), **constants, **blocks,
        )  # fmt: skip
    grad_weight = grad_raw.to(q.dtype).flatten(0, 1).T @ out.view(B * T, H * d)
    gradients = [grad_x, grad_q, grad_k, grad_v, grad_weight]
    if bias is not None:
        gradients.append(grad_raw.sum((0, 1)))
    inputs = (t for t in (x, q, k, v, weight, bias) if t is not None)
    return [grad.to(like.dtype) for grad, like in zip(gradients, inputs)]
