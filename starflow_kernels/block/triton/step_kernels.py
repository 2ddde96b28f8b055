"""Triton kernels of a sampling step, which takes n tokens of each sequence through a layer in five launches.

Row r is token r % n of sequence r // n, in slot position + r % n of the cache. The position is read from device memory,
so that one CUDA graph serves every token. In sweeps, every sequence has its own position and a slot `stop` where its
window ends; tiles whose rows are all past it return at once. A program computes BLOCK_M rows and some outputs of a
product.

With post-norms, a residual is normed before it is added to the state. The norm needs whole rows, so the next kernel
does both.
"""

import triton
import triton.language as tl

from ..._triton.math import inverse_root, mean_of, tanh
from .tiles import (
    PRODUCT_N,
    RMS_EPS,
    add_product,
    is_last_arrival,
    load_state,
    load_tile,
    load_vector,
    load_weight,
    none_inside,
    norm_statistics,
    normalize,
    prefetch_weight,
    scale_channels,
    store_statistics,
    wait_for_previous,
    window_slots,
)

# sqrt(2 / pi), and the factor of the cubic term, in the tanh approximation of GELU.
GELU_SLOPE = tl.constexpr(0.7978845608028654)
GELU_CUBIC = tl.constexpr(0.044715)
SQRT_HALF = tl.constexpr(0.7071067811865476)


@triton.jit(do_not_specialize=("rows", "slots"), do_not_specialize_on_alignment=("n",))
def block_qkv_kernel(
    h, h_next, residual, post, statistics, norm_weight, norm_bias, weight, bias, head_norms, cos, sin, scale,
    position, q, k_cache, v_cache, weight_scale, stop, rows, n, C, slots,
    H: tl.constexpr, KV: tl.constexpr, HEAD: tl.constexpr, NORM: tl.constexpr, POST: tl.constexpr,
    BIAS: tl.constexpr, QK_NORM: tl.constexpr, ROTARY: tl.constexpr, FIRST: tl.constexpr, TILES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PAIRS: tl.constexpr,
    DTYPE: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Norm the rows, project them to some pairs of values of one head, norm and rotate these, and fill the cache.

    A pair is value p and value p + half of a head. FIRST: whether the position is in position[1], where the head kernel
    has left it and no program of this kernel writes.
    """
    blocks = tl.cdiv(rows, BLOCK_M)
    column = tl.program_id(0) // blocks
    row = (tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    HALF: tl.constexpr = HEAD - HEAD // 2
    PAIR_TILES: tl.constexpr = (HALF + PAIRS - 1) // PAIRS
    head, pair = column // PAIR_TILES, column % PAIR_TILES * PAIRS + tl.arange(0, PAIRS)
    inside = row < rows
    weight_a = weight + head.to(tl.int64) * HEAD * C
    prefetch_weight(weight_a, pair, 0, C, HALF, C, PDL)
    prefetch_weight(weight_a + HALF * C, pair, 0, C, HEAD // 2, C, PDL)
    wait_for_previous(PDL)
    if stop is None:
        base = tl.load(position + 1 if FIRST else position)
        if FIRST and tl.program_id(0) == 0:
            tl.store(position, base)
    else:
        slot, inside = window_slots(position, stop, row, n, rows)
        if none_inside(inside):
            return
    factor, mean, size = norm_statistics(
        h, residual, post, statistics, row, rows, C, NORM, POST, TILES, BLOCK_M, BLOCK_K
    )
    a = tl.zeros([BLOCK_M, PAIRS], tl.float32)
    b = tl.zeros([BLOCK_M, PAIRS], tl.float32)
    for start in range(0, C, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        x = load_state(h, residual, post, factor, row, c, rows, C, POST)  # (BLOCK_M, BLOCK_K)
        if FIRST or POST:
            # Only the programs of the first column store the state.
            mask = (row < tl.where(column == 0, rows, 0))[:, None] & (c < C)[None, :]
            tl.store(h_next + row[:, None] * C + c[None, :], x, mask)
        x = normalize(x, mean, size, norm_weight, norm_bias, c, C, NORM)
        # (BLOCK_M, PAIRS) each
        a = add_product(x, load_weight(weight_a, pair, c, HALF, C, DTYPE), a)
        b = add_product(x, load_weight(weight_a + HALF * C, pair, c, HEAD // 2, C, DTYPE), b)
    a = scale_channels(a, weight_scale, head * HEAD + pair, pair < HALF)
    b = scale_channels(b, weight_scale, head * HEAD + HALF + pair, pair < HEAD // 2)
    if BIAS:
        a += load_vector(bias + head * HEAD, pair, pair < HALF)[None, :]
        b += load_vector(bias + head * HEAD + HALF, pair, pair < HEAD // 2)[None, :]
    rotated = head < H + KV
    if QK_NORM:
        inverse = inverse_root(mean_of(tl.sum(a * a, 1) + tl.sum(b * b, 1), HEAD) + RMS_EPS)
        inverse = tl.where(rotated, inverse, 1.0)
        # head_norms holds the norm of queries, then the norm of keys; values have none.
        norm = head_norms + tl.where(head < H, 0, HEAD)
        a *= inverse[:, None] * (1 + load_vector(norm, pair, pair < tl.where(rotated, HALF, 0)))[None, :]
        b *= inverse[:, None] * (1 + load_vector(norm + HALF, pair, pair < tl.where(rotated, HEAD // 2, 0)))[None, :]
    if stop is None:
        slot = base + row % n
    if ROTARY:
        offsets = slot[:, None] * (HEAD // 2) + pair[None, :]
        known = inside[:, None] & (pair < tl.where(rotated, HEAD // 2, 0))[None, :]
        c, s = tl.load(cos + offsets, known, 1.0), tl.load(sin + offsets, known, 0.0)  # (BLOCK_M, PAIRS) each
        a, b = a * c - b * s, b * c + a * s
    first, second = inside[:, None] & (pair < HALF)[None, :], inside[:, None] & (pair < HEAD // 2)[None, :]
    if head < H:
        q_scale = tl.load(scale + row // n, row < rows, 0)[:, None]  # (BLOCK_M, 1)
        q_offsets = (row * H + head)[:, None] * HEAD + pair[None, :]
        tl.store(q + q_offsets, a * q_scale, first)
        tl.store(q + q_offsets + HALF, b * q_scale, second)
    else:
        cache_offsets = ((row // n * KV + (head - H) % KV) * slots + slot)[:, None] * HEAD + pair[None, :]
        if rotated:
            tl.store(k_cache + cache_offsets, a, first)
            tl.store(k_cache + cache_offsets + HALF, b, second)
        else:
            tl.store(v_cache + cache_offsets, a, first)
            tl.store(v_cache + cache_offsets + HALF, b, second)


@triton.jit
def _add_to_softmax(best, weight, value, score, share, part):
    """Add terms with scores (S,), sums of weights (S,) and values (S, BLOCK_D) to a softmax; return all three."""
    highest = tl.maximum(best, tl.max(score, 0))
    kept, p = tl.exp(best - highest), tl.exp(score - highest)
    return highest, weight * kept + tl.sum(p * share, 0), value * kept + tl.sum(p[:, None] * part, 0)


@triton.jit(do_not_specialize=("slots", "splits"), do_not_specialize_on_alignment=("n",))
def block_attend_kernel(
    q, k_cache, v_cache, position, split_out, split_max, split_sum, tickets, attended, n, slots, splits,
    H: tl.constexpr, KV: tl.constexpr, HEAD: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Attend with one query to one split of the keys; the last program of a query joins its splits in order."""
    wait_for_previous(PDL)
    split = tl.program_id(0) % splits
    query = tl.program_id(0) // splits
    row, head = (query // H).to(tl.int64), query % H
    last = tl.load(position) + row % n
    i, s = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_S)
    if split * SPLIT <= last:
        q_head = load_vector(q + (row * H + head) * HEAD, i, i < HEAD)  # (BLOCK_D,)
        cache_start = (row // n * KV + head // (H // KV)) * slots * HEAD
        best = tl.full([], float("-inf"), tl.float32)
        weight = tl.zeros([], tl.float32)
        value = tl.zeros([BLOCK_D], tl.float32)
        ones = tl.full([BLOCK_S], 1.0, tl.float32)
        # A loop without tl.dot loads ahead only if it asks for stages.
        for start in tl.range(split * SPLIT, tl.minimum((split + 1) * SPLIT, last + 1), BLOCK_S, num_stages=STAGES):
            slot = start + s
            offsets = cache_start + slot[:, None] * HEAD + i[None, :]
            seen = (slot <= last)[:, None] & (i < HEAD)[None, :]
            k = tl.load(k_cache + offsets, seen, 0).to(tl.float32)  # (BLOCK_S, BLOCK_D)
            v = tl.load(v_cache + offsets, seen, 0).to(tl.float32)  # (BLOCK_S, BLOCK_D)
            score = tl.where(slot <= last, tl.sum(k * q_head[None, :], 1), float("-inf"))
            best, weight, value = _add_to_softmax(best, weight, value, score, ones, v)
        first = query.to(tl.int64) * splits
        tl.store(split_max + first + split, best)
        tl.store(split_sum + first + split, weight)
        tl.store(split_out + (first + split) * HEAD + i, value, i < HEAD)
        used = last // SPLIT + 1
        if is_last_arrival(tickets + query, used):
            best = tl.full([], float("-inf"), tl.float32)
            weight = tl.zeros([], tl.float32)
            value = tl.zeros([BLOCK_D], tl.float32)
            for start in range(0, used, BLOCK_S):
                offsets, known = first + start + s, start + s < used
                most = tl.load(split_max + offsets, known, float("-inf"))  # (BLOCK_S,)
                share = tl.load(split_sum + offsets, known, 0.0)  # (BLOCK_S,)
                # (BLOCK_S, BLOCK_D)
                part = tl.load(
                    split_out + offsets[:, None] * HEAD + i[None, :], known[:, None] & (i < HEAD)[None, :], 0.0
                )
                best, weight, value = _add_to_softmax(best, weight, value, most, share, part)
            tl.store(attended + (row * H + head) * HEAD + i, value / weight, i < HEAD)


@triton.jit(do_not_specialize=("rows",), do_not_specialize_on_alignment=("n",))
def block_up_kernel(
    h, h_next, residual, post, statistics, norm_weight, norm_bias, weight, bias, gate, gate_bias, hidden,
    weight_scale, gate_scale, position, stop, rows, n, C, width,
    NORM: tl.constexpr, POST: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, TILES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, DTYPE: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Norm the rows and compute the hidden values of the MLP."""
    blocks = tl.cdiv(rows, BLOCK_M)
    column = tl.program_id(0) // blocks
    row = (tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    out = (column * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    prefetch_weight(weight, out, 0, C, width, C, PDL)
    if GATED:
        prefetch_weight(gate, out, 0, C, width, C, PDL)
    wait_for_previous(PDL)
    if stop is not None:  # noqa: SIM102, a compile-time condition
        if none_inside(window_slots(position, stop, row, n, rows)[1]):
            return
    factor, mean, size = norm_statistics(
        h, residual, post, statistics, row, rows, C, NORM, POST, TILES, BLOCK_M, BLOCK_K
    )
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    gates = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, C, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        x = load_state(h, residual, post, factor, row, c, rows, C, POST)  # (BLOCK_M, BLOCK_K)
        if POST:
            mask = (row < tl.where(column == 0, rows, 0))[:, None] & (c < C)[None, :]
            tl.store(h_next + row[:, None] * C + c[None, :], x, mask)
        x = normalize(x, mean, size, norm_weight, norm_bias, c, C, NORM)
        # (BLOCK_M, BLOCK_N)
        up = add_product(x, load_weight(weight, out, c, width, C, DTYPE), up)
        if GATED:
            gates = add_product(x, load_weight(gate, out, c, width, C, DTYPE), gates)
    up = scale_channels(up, weight_scale, out, out < width)
    gates = scale_channels(gates, gate_scale, out, out < width)
    if BIAS:
        up += load_vector(bias, out, out < width)[None, :]
        if GATED:
            gates += load_vector(gate_bias, out, out < width)[None, :]
    if GATED:
        inner = GELU_SLOPE * (gates + GELU_CUBIC * gates * gates * gates)
        up *= 0.5 * gates * (1 + tanh(inner))
    else:
        up *= 0.5 * (1 + tl.erf(up * SQRT_HALF))
    offsets = row[:, None] * width + out[None, :]
    tl.store(hidden + offsets, up, (row < rows)[:, None] & (out < width)[None, :])


@triton.jit(do_not_specialize=("rows",), do_not_specialize_on_alignment=("n",))
def block_product_kernel(
    x, weight, bias, h, residual, statistics, partial, tickets, weight_scale, position, stop, rows, n, C, width,
    PARTS: tl.constexpr, BIAS: tl.constexpr, POST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    DTYPE: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Add the product of x (rows, width) with a weight, and its bias, to the state, or store it as the residual.

    It is the output projection of attention, and the second product of the MLP. With POST, it is stored as the
    residual, which is not yet normed. Each of PARTS programs takes a part of the width; the last one to arrive adds
    their sums in order, and stores the statistics of what it stores.
    """
    blocks = tl.cdiv(rows, BLOCK_M)
    column, part = tl.program_id(0) // blocks // PARTS, tl.program_id(0) // blocks % PARTS
    row = (tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    out = (column * PRODUCT_N + tl.arange(0, PRODUCT_N)).to(tl.int64)
    size = tl.cdiv(tl.cdiv(width, BLOCK_K), PARTS) * BLOCK_K
    first, end = part * size, tl.minimum((part + 1) * size, width)
    prefetch_weight(weight, out, first, end, C, width, PDL)
    wait_for_previous(PDL)
    if stop is not None:  # noqa: SIM102, a compile-time condition
        if none_inside(window_slots(position, stop, row, n, rows)[1]):
            return
    total = tl.zeros([BLOCK_M, PRODUCT_N], tl.float32)
    for start in range(first, end, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        # (BLOCK_M, PRODUCT_N)
        total = add_product(load_tile(x, row, c, rows, width), load_weight(weight, out, c, C, width, DTYPE), total)
    offsets, inside = row[:, None] * C + out[None, :], (row < rows)[:, None] & (out < C)[None, :]
    if PARTS > 1:
        numbers = tl.cast(rows, tl.int64) * C
        tl.store(partial + part * numbers + offsets, total, inside)
        if not is_last_arrival(tickets + column * blocks + tl.program_id(0) % blocks, PARTS):
            return
        total = tl.zeros([BLOCK_M, PRODUCT_N], tl.float32)
        for i in tl.static_range(PARTS):
            total += tl.load(partial + i * numbers + offsets, inside, 0)  # (BLOCK_M, PRODUCT_N)
    total = scale_channels(total, weight_scale, out, out < C)
    if BIAS:
        total += load_vector(bias, out, out < C)[None, :]
    if not POST:
        total += tl.load(h + offsets, inside, 0)  # (BLOCK_M, PRODUCT_N)
    tl.store((residual if POST else h) + offsets, total, inside)
    store_statistics(statistics, total, row, column, rows, C)
