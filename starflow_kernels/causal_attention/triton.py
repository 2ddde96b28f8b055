"""Causal attention in Triton, with rotary positions, window and grouped heads. Scores never reach memory.

A head is read as two tiles: the first and the second values of all rotated pairs. q . k is the sum of the products of
the tiles. A separate kernel rotates the tensors that a program loops over, because rotating them inside the loop would
repeat the work in every warp and take registers that the products need. Gradients are rotated back as they are stored.

A program of the forward or dq kernel takes a block of queries and loops over the keys that they see. A program of the
dk and dv kernel takes a block of keys and loops over the heads of the group and the queries that see the keys. Programs
share no sums, and block sizes do not depend on the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._core.numerics import last_dim_contiguous
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
from .reference import used_output

WIDEST = 256
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _visible(query, key, window, WINDOW: tl.constexpr):
    if WINDOW:
        return (key <= query) & (key > query - window)
    return key <= query


@triton.jit
def score_factor(query, T, window, WINDOW: tl.constexpr):
    """Return 0 for a query that sees only one key, else 1.

    The weight of a single key is exactly 1, and the gradient of its score is exactly that of the log-sum-exp.
    """
    alone = query == 0
    if WINDOW:
        alone = query < tl.where(window == 1, T, 1)
    return tl.where(alone, 0.0, 1.0)


@triton.jit
def key_bounds(query, T, window, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the four bounds of three ranges of keys for a block of queries, all of which see the keys of the second.

    Without a window the first range is empty.
    """
    last = (query + 1) // BLOCK_N * BLOCK_N
    stop = tl.minimum(query + BLOCK_M, T)
    if WINDOW:
        first = tl.maximum(query - window + 1, 0) // BLOCK_N * BLOCK_N
        seen = tl.cdiv(tl.maximum(query - window + BLOCK_M, 0), BLOCK_N) * BLOCK_N
        return first, tl.minimum(seen, last), last, stop
    return 0, 0, last, stop


@triton.jit
def first_rows(x, stride, start, BLOCK: tl.constexpr):
    """Return the pointer to token `start` and the distance from a block of tokens to the next.

    A loop that adds the distance has no 64-bit products. With them ptxas lets no product of tensor cores overlap.
    """
    stride = tl.cast(stride, tl.int64)
    return x + start * stride, BLOCK * stride


@triton.jit
def attend(
    acc, total, top, q1, q2, k, v, k_stride, v_stride, query, start, stop, T, window, factor,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, HEAD: tl.constexpr, HALF: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the keys start .. stop - 1 to the softmax sums relative to 2^top; factor scales scores to base 2."""
    k, k_step = first_rows(k, k_stride, start, BLOCK_N)
    v, v_step = first_rows(v, v_stride, start, BLOCK_N)
    for key in range(start, stop, BLOCK_N):
        # (BLOCK_N, HALF) each, (BLOCK_N, 2 HALF)
        k1, k2 = load_pair(k, k_stride, None, None, 0, T - key if MASKED else BLOCK_N, HEAD, HALF, "none", BLOCK_N)
        value = load_rows(v, v_stride, 0, T - key if MASKED else BLOCK_N, HEAD, 2 * HALF, BLOCK_N)
        # (BLOCK_M, BLOCK_N)
        score = tl.dot(q1, tl.trans(k1), input_precision="ieee")
        score = tl.dot(q2, tl.trans(k2), score, input_precision="ieee") * factor
        if MASKED:
            keys = key + tl.arange(0, BLOCK_N)
            queries = query + tl.arange(0, BLOCK_M)
            score = tl.where(_visible(queries[:, None], keys[None, :], window, WINDOW), score, float("-inf"))
        highest = tl.maximum(top, tl.max(score, 1))
        # A query whose window starts later has seen no key yet.
        base = tl.where(highest == float("-inf"), 0.0, highest) if MASKED and WINDOW else highest
        weight = tl.exp2(score - base[:, None])
        kept = tl.exp2(top - base)
        total = total * kept + tl.sum(weight, 1)
        # (BLOCK_M, 2 HALF)
        acc = tl.dot(weight.to(value.dtype), value, acc * kept[:, None], input_precision="ieee")
        top = highest
        k += k_step
        v += v_step
    return acc, total, top


@triton.jit(do_not_specialize=("H", "group", "window"))
def causal_attention_forward_kernel(
    q, k, v, cos, sin, out, lse, T, H, group, window, factor,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    WINDOW: tl.constexpr, HEAD: tl.constexpr, HALF: tl.constexpr, ROTARY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store output and log-sum-exp of BLOCK_M queries of one head."""
    block, head, row = block_head_row(tl.cdiv(T, BLOCK_M), H)
    # The queries that see the most keys start first.
    query = (tl.cdiv(T, BLOCK_M) - 1 - block) * BLOCK_M
    k += row * k_row + head // group * k_head
    v += row * v_row + head // group * v_head
    # (BLOCK_M, HALF) each
    q1, q2 = load_pair(q + row * q_row + head * q_head, q_token, cos, sin, query, T, HEAD, HALF, ROTARY, BLOCK_M)
    acc = tl.zeros([BLOCK_M, 2 * HALF], tl.float32)
    total, top = tl.zeros([BLOCK_M], tl.float32), tl.full([BLOCK_M], float("-inf"), tl.float32)
    bounds = key_bounds(query, T, window, WINDOW, BLOCK_M, BLOCK_N)
    for part in tl.static_range(0 if WINDOW else 1, 3):
        acc, total, top = attend(
            acc, total, top, q1, q2, k, v, k_token, v_token, query,
            bounds[part], bounds[part + 1], T, window, factor, part != 1,
            WINDOW, HEAD, HALF, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    pointers, mask = row_pointers(out + (row * T * H + head) * HEAD, H * HEAD, query, T, HEAD, 2 * HALF, BLOCK_M)
    tl.store(pointers, acc / total[:, None], mask)
    queries = query + tl.arange(0, BLOCK_M)
    tl.store(lse + (row * H + head) * T + queries, (top + tl.log2(total)) * LN_2, queries < T)


@triton.jit(do_not_specialize=("H", "window"))
def causal_attention_delta_kernel(
    out, grad_out, grad_lse, delta, T, H, window, g_row, g_token, g_head,
    HAS_LSE: tl.constexpr, WINDOW: tl.constexpr, HEAD: tl.constexpr, HALF: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Store delta = rowsum(dO * O) - dlse of BLOCK_M queries, so that dS = P (dO V^T - delta)."""
    block, head, row = block_head_row(tl.cdiv(T, BLOCK_M), H)
    query = block * BLOCK_M
    # (BLOCK_M, 2 HALF) each
    o = load_rows(out + (row * T * H + head) * HEAD, H * HEAD, query, T, HEAD, 2 * HALF, BLOCK_M)
    g = load_rows(grad_out + row * g_row + head * g_head, g_token, query, T, HEAD, 2 * HALF, BLOCK_M)
    queries = query + tl.arange(0, BLOCK_M)
    deltas = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1) * score_factor(queries, T, window, WINDOW)
    offsets = (row * H + head) * T + queries
    if HAS_LSE:
        deltas -= tl.load(grad_lse + offsets, queries < T, 0)  # (BLOCK_M,)
    tl.store(delta + offsets, deltas, queries < T)


@triton.jit
def add_to_keys(
    dk1, dk2, dv, k1, k2, value, q, grad_out, lse, delta, q_stride, g_stride, key, start, stop, T, window,
    factor, width, WINDOW: tl.constexpr, HEAD: tl.constexpr, HALF: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add dS^T Q and P^T dO over the queries start .. stop - 1 of a head; grad_out has `width` values per token."""
    for query in range(start, stop, BLOCK_M):
        q1, q2 = load_pair(q, q_stride, None, None, query, T, HEAD, HALF, "none", BLOCK_M)  # (BLOCK_M, HALF) each
        g = load_rows(grad_out, g_stride, query, T, width, BLOCK_V, BLOCK_M).to(value.dtype)  # (BLOCK_M, BLOCK_V)
        queries = query + tl.arange(0, BLOCK_M)
        counts = score_factor(queries, T, window, WINDOW)
        # (BLOCK_M,)
        lse_2 = tl.where(counts > 0, tl.load(lse + queries, queries < T, float("inf")) * LOG2_E, 0.0)
        # (BLOCK_N, BLOCK_M)
        score = tl.dot(k1, tl.trans(q1), input_precision="ieee")
        score = tl.dot(k2, tl.trans(q2), score, input_precision="ieee") * (factor * counts)[None, :]
        weight = tl.exp2(score - lse_2[None, :])
        keys = key + tl.arange(0, BLOCK_N)
        weight = tl.where(_visible(queries[None, :], keys[:, None], window, WINDOW), weight, 0.0)
        dv = tl.dot(weight.to(g.dtype), g, dv, input_precision="ieee")  # (BLOCK_N, BLOCK_V)
        d_weight = tl.dot(value, tl.trans(g), input_precision="ieee")  # (BLOCK_N, BLOCK_M)
        deltas = tl.load(delta + queries, queries < T, 0)  # (BLOCK_M,)
        d_score = weight * (d_weight * counts[None, :] - deltas[None, :])
        # (BLOCK_N, HALF) each
        dk1 = tl.dot(d_score.to(q1.dtype), q1, dk1, input_precision="ieee")
        dk2 = tl.dot(d_score.to(q2.dtype), q2, dk2, input_precision="ieee")
    return dk1, dk2, dv


@triton.jit(do_not_specialize=("H", "group", "window"))
def causal_attention_keys_kernel(
    q, k, v, cos, sin, grad_out, lse, delta, grad_k, grad_v, T, H, group, window, factor, scale,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, g_row, g_token, g_head,
    WINDOW: tl.constexpr, HEAD: tl.constexpr, HALF: tl.constexpr, ROTARY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store dk and dv of BLOCK_N keys of one key head, over the query heads of its group."""
    heads = H // group
    block, kv_head, row = block_head_row(tl.cdiv(T, BLOCK_N), heads)
    key = block * BLOCK_N
    # (BLOCK_N, HALF) each, (BLOCK_N, 2 HALF)
    k1, k2 = load_pair(k + row * k_row + kv_head * k_head, k_token, None, None, key, T, HEAD, HALF, "none", BLOCK_N)
    value = load_rows(v + row * v_row + kv_head * v_head, v_token, key, T, HEAD, 2 * HALF, BLOCK_N)
    dk1, dk2 = tl.zeros([BLOCK_N, HALF], tl.float32), tl.zeros([BLOCK_N, HALF], tl.float32)
    dv = tl.zeros([BLOCK_N, 2 * HALF], tl.float32)
    stop = tl.minimum(key + BLOCK_N + window - 1, T) if WINDOW else T
    for head in range(kv_head * group, (kv_head + 1) * group):
        q_start, g_start = q + row * q_row + head * q_head, grad_out + row * g_row + head * g_head
        lse_offset = (row * H + head) * T
        dk1, dk2, dv = add_to_keys(
            dk1, dk2, dv, k1, k2, value, q_start, g_start, lse + lse_offset, delta + lse_offset, q_token, g_token,
            key, key, stop, T, window, factor, HEAD, WINDOW, HEAD, HALF, 2 * HALF, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    offset = (row * T * heads + kv_head) * HEAD
    store_pair(grad_k + offset, heads * HEAD, cos, sin, key, T, dk1 * scale, dk2 * scale, HEAD, HALF, ROTARY, BLOCK_N)
    pointers, mask = row_pointers(grad_v + offset, heads * HEAD, key, T, HEAD, 2 * HALF, BLOCK_N)
    tl.store(pointers, dv, mask)


@triton.jit
def add_to_queries(
    dq1, dq2, q1, q2, g, counts, lse_2, delta, k, v, k_stride, v_stride, query, start, stop, T, window, factor,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, HEAD: tl.constexpr, HALF: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add dS K over the keys start .. stop - 1; counts: see score_factor; lse_2: log-sum-exp in base 2."""
    k, k_step = first_rows(k, k_stride, start, BLOCK_N)
    v, v_step = first_rows(v, v_stride, start, BLOCK_N)
    for key in range(start, stop, BLOCK_N):
        # (BLOCK_N, HALF) each, (BLOCK_N, 2 HALF)
        k1, k2 = load_pair(k, k_stride, None, None, 0, T - key if MASKED else BLOCK_N, HEAD, HALF, "none", BLOCK_N)
        value = load_rows(v, v_stride, 0, T - key if MASKED else BLOCK_N, HEAD, 2 * HALF, BLOCK_N)
        # (BLOCK_M, BLOCK_N)
        score = tl.dot(q1, tl.trans(k1), input_precision="ieee")
        score = tl.dot(q2, tl.trans(k2), score, input_precision="ieee") * (factor * counts)[:, None]
        weight = tl.exp2(score - lse_2[:, None])
        if MASKED:
            keys = key + tl.arange(0, BLOCK_N)
            queries = query + tl.arange(0, BLOCK_M)
            weight = tl.where(_visible(queries[:, None], keys[None, :], window, WINDOW), weight, 0.0)
        d_weight = tl.dot(g, tl.trans(value), input_precision="ieee")  # (BLOCK_M, BLOCK_N)
        d_score = weight * (d_weight * counts[:, None] - delta[:, None])
        # (BLOCK_M, HALF) each
        dq1 = tl.dot(d_score.to(k1.dtype), k1, dq1, input_precision="ieee")
        dq2 = tl.dot(d_score.to(k2.dtype), k2, dq2, input_precision="ieee")
        k += k_step
        v += v_step
    return dq1, dq2


@triton.jit(do_not_specialize=("H", "group", "window"))
def causal_attention_queries_kernel(
    q, k, v, cos, sin, grad_out, lse, delta, grad_q, T, H, group, window, factor, scale,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, g_row, g_token, g_head,
    WINDOW: tl.constexpr, HEAD: tl.constexpr, HALF: tl.constexpr, ROTARY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store dq of BLOCK_M queries of one head."""
    block, head, row = block_head_row(tl.cdiv(T, BLOCK_M), H)
    query = (tl.cdiv(T, BLOCK_M) - 1 - block) * BLOCK_M
    k += row * k_row + head // group * k_head
    v += row * v_row + head // group * v_head
    # (BLOCK_M, HALF) each
    q1, q2 = load_pair(q + row * q_row + head * q_head, q_token, None, None, query, T, HEAD, HALF, "none", BLOCK_M)
    # (BLOCK_M, 2 HALF)
    g = load_rows(grad_out + row * g_row + head * g_head, g_token, query, T, HEAD, 2 * HALF, BLOCK_M)
    queries, lse_offset = query + tl.arange(0, BLOCK_M), (row * H + head) * T
    counts = score_factor(queries, T, window, WINDOW)
    # (BLOCK_M,)
    lse_2 = tl.where(counts > 0, tl.load(lse + lse_offset + queries, queries < T, float("inf")) * LOG2_E, 0.0)
    deltas = tl.load(delta + lse_offset + queries, queries < T, 0)  # (BLOCK_M,)
    dq1, dq2 = tl.zeros([BLOCK_M, HALF], tl.float32), tl.zeros([BLOCK_M, HALF], tl.float32)
    bounds = key_bounds(query, T, window, WINDOW, BLOCK_M, BLOCK_N)
    for masked in tl.static_range(1 if WINDOW else 0, 2):
        dq1, dq2 = add_to_queries(
            dq1, dq2, q1, q2, g.to(q1.dtype), counts, lse_2, deltas, k, v, k_token, v_token, query,
            bounds[0 if WINDOW else 1 + masked], bounds[2 + masked], T, window, factor, masked,
            WINDOW, HEAD, HALF, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    target = grad_q + (row * T * H + head) * HEAD
    store_pair(target, H * HEAD, cos, sin, query, T, dq1 * scale, dq2 * scale, HEAD, HALF, ROTARY, BLOCK_M)


def refuse(q, k, v, cos, sin, *others) -> str | None:
    """Return why the kernels cannot take these arguments, or None."""
    B, T, H, d = q.shape
    if d > WIDEST:
        return f"heads of {d} values, it takes up to {WIDEST}"
    if B * H * T >= 2**31:
        return "it takes fewer than 2^31 queries"
    return refuse_tensors(q, k, v)


def refuse_backward(grads, outputs, *args) -> str | None:
    """Return why the backward kernels cannot take these arguments, or None."""
    return refuse(*args)


def shared_constants(T: int, d: int, rotary: str, window: int) -> dict:
    """Return the compile-time arguments that all attention kernels take."""
    return {"WINDOW": 0 < window < T, "HEAD": d, "HALF": half_tile(d), "ROTARY": rotary}


def causal_attention(q, k, v, cos, sin, rotary, window, temperature) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.causal_attention."""
    (B, T, H, d), group, half = q.shape, q.shape[2] // k.shape[2], half_tile(q.shape[3])
    (q, k, v), (cos, sin) = last_dim_contiguous(q, k, v), angles(cos, sin)
    out, lse = q.new_empty(q.shape), q.new_empty((B, H, T), dtype=torch.float32)
    blocks = config("causal_attention", "forward", q, half)
    if B:
        k = apply_rotary(k, cos, sin, rotary)
        causal_attention_forward_kernel[(B * H * triton.cdiv(T, blocks["BLOCK_M"]),)](
            q, k, v, cos, sin, out, lse, T, H, group, window, d**-0.5 / temperature * LOG2_E.value,
            *strides(q, k, v), **shared_constants(T, d, rotary, window), **blocks,
        )  # fmt: skip
    return out, lse


def causal_attention_backward(grads, outputs, q, k, v, cos, sin, rotary, window, temperature) -> list[torch.Tensor]:
    """See reference.causal_attention_backward."""
    (B, T, H, d), group, half = q.shape, q.shape[2] // k.shape[2], half_tile(q.shape[3])
    grad_out, out, v = used_output(grads, outputs, v)
    out, lse, (grad_out,) = out.contiguous(), outputs[1].contiguous(), last_dim_contiguous(grad_out)
    grad_lse = None if grads[1] is None else grads[1].contiguous()
    (q, k, v), (cos, sin) = last_dim_contiguous(q, k, v), angles(cos, sin)
    grad_q, grad_k, grad_v = (t.new_empty(t.shape) for t in (q, k, v))
    if not B:
        return [grad_q, grad_k, grad_v]
    delta, constants = torch.empty_like(lse), shared_constants(T, d, rotary, window)
    causal_attention_delta_kernel[(B * H * triton.cdiv(T, 32),)](
        out, grad_out, grad_lse, delta, T, H, window, *strides(grad_out),
        HAS_LSE=grad_lse is not None, WINDOW=constants["WINDOW"], HEAD=d, HALF=half, BLOCK_M=32,
    )  # fmt: skip
    q, k = (apply_rotary(t, cos, sin, rotary) for t in (q, k))
    inputs, scale = (q, k, v, cos, sin, grad_out, lse, delta), d**-0.5 / temperature
    sizes = T, H, group, window, scale * LOG2_E.value, scale, *strides(q, k, v, grad_out)
    blocks = config("causal_attention", "keys", q, half)
    grid = B * (H // group) * triton.cdiv(T, blocks["BLOCK_N"])
    causal_attention_keys_kernel[(grid,)](*inputs, grad_k, grad_v, *sizes, **constants, **blocks)
    blocks = config("causal_attention", "queries", q, half)
    grid = B * H * triton.cdiv(T, blocks["BLOCK_M"])
    causal_attention_queries_kernel[(grid,)](*inputs, grad_q, *sizes, **constants, **blocks)
    return [grad_q, grad_k, grad_v]
