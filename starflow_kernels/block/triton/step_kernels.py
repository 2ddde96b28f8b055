"""Triton kernels of a sampling step: n tokens of each sequence through a layer in five launches, then the head.

A row is one token of one sequence: row r is token r % n of sequence r // n, in slot position + r % n of the cache. The
position is read from the device, so that one CUDA graph serves every token. In sweeps every sequence has a position of
its own and a slot `stop` where its window ends; tiles of rows that are all beyond it rest. A program takes BLOCK_M rows
and some outputs through a product; tiles and the order of every sum are fixed, so that a row has the same bits in any
batch. Where a layer norms its updates, the sum with the normed update is left to the kernel after it, which has whole
rows.
"""

import triton
import triton.language as tl

from ..._triton.math import tanh

RMS_EPS = tl.constexpr(1e-6)
LAYER_EPS = tl.constexpr(1e-5)


@triton.jit
def _begun(PDL: tl.constexpr):
    """By programmatic dependent launch a kernel starts beside the one before: nothing of it is read until that is over,
    and the next one may start."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _place(position, stop, row, n, rows):
    """Slots of the rows of sweeps, and which rows are inside their windows."""
    slot = tl.load(position + row // n, row < rows, 0) + row % n
    return slot, slot < tl.load(stop + row // n, row < rows, 0)


@triton.jit
def _none(inside):
    return tl.max(inside.to(tl.int32), 0) == 0


@triton.jit
def _tile(x, row, c, rows, width):
    """Values c of some rows as float32; zero outside."""
    return tl.load(x + row[:, None] * width + c[None, :], (row < rows)[:, None] & (c < width)[None, :], 0).to(
        tl.float32
    )


@triton.jit
def _vector(x, i, inside):
    return tl.load(x + i, inside, 0).to(tl.float32)


@triton.jit
def _decoded(w, DTYPE: tl.constexpr):
    """Weights of one byte as DTYPE, others as they are.

    uint8 holds the bits of float8_e4m3fn. In the place of those of float16 they are 1/256 of the value, subnormal ones
    too, which the scale makes up for: no target needs an instruction for it.
    """
    if w.dtype == tl.int8:
        return w.to(DTYPE)
    elif w.dtype == tl.uint8:
        bits = (w.to(tl.int8, bitcast=True).to(tl.int16) << 7) & -16385
        return bits.to(tl.float16, bitcast=True).to(DTYPE)
    else:
        return w


@triton.jit
def _columns(weight, out, c, outs, width, DTYPE: tl.constexpr = None):
    """The transposed tile of a weight (outs, width)."""
    w = tl.load(weight + out[None, :] * width + c[:, None], (out < outs)[None, :] & (c < width)[:, None], 0)
    return _decoded(w, DTYPE)


@triton.jit
def _scaled(total, scale, out, inside):
    """Sums of products with one-byte weights, times the scales of their channels."""
    if scale is not None:
        total *= _vector(scale, out, inside)[None, :]
    return total


@triton.jit
def _product(x, w, total):
    return tl.dot(x.to(w.dtype), w, total, input_precision="ieee")


@triton.jit
def _entering(h, update, post, factor, row, c, rows, C, POST: tl.constexpr):
    """The state of the rows, with the update that has yet to be normed and added."""
    x = _tile(h, row, c, rows, C)
    if POST:
        x += _tile(update, row, c, rows, C) * factor[:, None] * (1 + _vector(post, c, c < C))[None, :]
    return x


@triton.jit
def _statistics(
    h, update, post, row, rows, C,
    NORM: tl.constexpr, POST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Factor of the update's norm; mean and factor of the state's."""
    factor = tl.full([BLOCK_M], 1.0, tl.float32)
    mean = tl.zeros([BLOCK_M], tl.float32)
    size = tl.full([BLOCK_M], 1.0, tl.float32)
    if POST:
        square = tl.zeros([BLOCK_M], tl.float32)
        for start in range(0, C, BLOCK_K):
            x = _tile(update, row, start + tl.arange(0, BLOCK_K), rows, C)
            square += tl.sum(x * x, 1)
        factor = 1 / tl.sqrt(square / C + RMS_EPS)
    if NORM == "layer_norm":
        for start in range(0, C, BLOCK_K):
            c = start + tl.arange(0, BLOCK_K)
            mean += tl.sum(_entering(h, update, post, factor, row, c, rows, C, POST), 1)
        mean = mean / C
    if NORM != "none":
        square = tl.zeros([BLOCK_M], tl.float32)
        for start in range(0, C, BLOCK_K):
            c = start + tl.arange(0, BLOCK_K)
            x = _entering(h, update, post, factor, row, c, rows, C, POST)
            x = tl.where((c < C)[None, :], x - mean[:, None], 0.0)
            square += tl.sum(x * x, 1)
        size = 1 / tl.sqrt(square / C + (LAYER_EPS if NORM == "layer_norm" else RMS_EPS))
    return factor, mean, size


@triton.jit
def _normed(x, mean, size, weight, bias, c, C, NORM: tl.constexpr):
    if NORM == "layer_norm":
        x = (x - mean[:, None]) * size[:, None] * _vector(weight, c, c < C)[None, :]
        x += _vector(bias, c, c < C)[None, :]
    if NORM == "rms_norm":
        x = x * size[:, None] * (1 + _vector(weight, c, c < C))[None, :]
    return x


@triton.jit
def qkv_kernel(
    h, total, update, post, norm_weight, norm_bias, weight, bias, head_norms, cos, sin, scale, position,
    q, k_cache, v_cache, weight_scale, stop, rows, n, C, slots,
    H: tl.constexpr, KV: tl.constexpr, HEAD: tl.constexpr, NORM: tl.constexpr, POST: tl.constexpr,
    BIAS: tl.constexpr, QK_NORM: tl.constexpr, ROTARY: tl.constexpr, FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PAIRS: tl.constexpr,
    DTYPE: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Norm, some pairs of values of one head, their norm and rotation; keys and values go to the cache.

    A pair is value p and value p + half of a head. FIRST: the head kernel has left the position in the second place,
    where no program of this kernel writes.
    """
    _begun(PDL)
    blocks = tl.cdiv(rows, BLOCK_M)
    column = tl.program_id(0) // blocks
    row = (tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    HALF: tl.constexpr = HEAD - HEAD // 2
    PARTS: tl.constexpr = (HALF + PAIRS - 1) // PAIRS
    head, pair = column // PARTS, column % PARTS * PAIRS + tl.arange(0, PAIRS)
    inside = row < rows
    if stop is None:
        base = tl.load(position + 1 if FIRST else position)
        if FIRST and tl.program_id(0) == 0:
            tl.store(position, base)
    else:
        slot, inside = _place(position, stop, row, n, rows)
        if _none(inside):
            return
    factor, mean, size = _statistics(h, update, post, row, rows, C, NORM, POST, BLOCK_M, BLOCK_K)
    a = tl.zeros([BLOCK_M, PAIRS], tl.float32)
    b = tl.zeros([BLOCK_M, PAIRS], tl.float32)
    of_a = weight + head.to(tl.int64) * HEAD * C
    for start in range(0, C, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        x = _entering(h, update, post, factor, row, c, rows, C, POST)
        if FIRST or POST:
            mine = (row < tl.where(column == 0, rows, 0))[:, None] & (c < C)[None, :]
            tl.store(total + row[:, None] * C + c[None, :], x, mine)
        x = _normed(x, mean, size, norm_weight, norm_bias, c, C, NORM)
        a = _product(x, _columns(of_a, pair, c, HALF, C, DTYPE), a)
        b = _product(x, _columns(of_a + HALF * C, pair, c, HEAD // 2, C, DTYPE), b)
    a = _scaled(a, weight_scale, head * HEAD + pair, pair < HALF)
    b = _scaled(b, weight_scale, head * HEAD + HALF + pair, pair < HEAD // 2)
    if BIAS:
        a += _vector(bias + head * HEAD, pair, pair < HALF)[None, :]
        b += _vector(bias + head * HEAD + HALF, pair, pair < HEAD // 2)[None, :]
    turned = head < H + KV
    if QK_NORM:
        inverse = 1 / tl.sqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / HEAD + RMS_EPS)
        inverse = tl.where(turned, inverse, 1.0)
        which = head_norms + tl.where(head < H, 0, HEAD)
        a *= inverse[:, None] * (1 + _vector(which, pair, pair < tl.where(turned, HALF, 0)))[None, :]
        b *= inverse[:, None] * (1 + _vector(which + HALF, pair, pair < tl.where(turned, HEAD // 2, 0)))[None, :]
    if stop is None:
        slot = base + row % n
    if ROTARY:
        at = slot[:, None] * (HEAD // 2) + pair[None, :]
        known = inside[:, None] & (pair < tl.where(turned, HEAD // 2, 0))[None, :]
        c, s = tl.load(cos + at, known, 1.0), tl.load(sin + at, known, 0.0)
        a, b = a * c - b * s, b * c + a * s
    first, second = inside[:, None] & (pair < HALF)[None, :], inside[:, None] & (pair < HEAD // 2)[None, :]
    if head < H:
        by = tl.load(scale + row // n, row < rows, 0)[:, None]
        at = (row * H + head)[:, None] * HEAD + pair[None, :]
        tl.store(q + at, a * by, first)
        tl.store(q + at + HALF, b * by, second)
    else:
        at = ((row // n * KV + (head - H) % KV) * slots + slot)[:, None] * HEAD + pair[None, :]
        if turned:
            tl.store(k_cache + at, a, first)
            tl.store(k_cache + at + HALF, b, second)
        else:
            tl.store(v_cache + at, a, first)
            tl.store(v_cache + at + HALF, b, second)


@triton.jit
def attend_kernel(
    q, k_cache, v_cache, position, part, peak, mass, n, slots, splits,
    H: tl.constexpr, KV: tl.constexpr, HEAD: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, SPLIT: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """One query of one head over the keys of one split: their largest score, sum of weights and weighted values."""
    _begun(PDL)
    split = tl.program_id(0) % splits
    query = tl.program_id(0) // splits
    row, head = (query // H).to(tl.int64), query % H
    last = tl.load(position) + row % n
    i = tl.arange(0, BLOCK_D)
    if split * SPLIT <= last:
        asked = _vector(q + (row * H + head) * HEAD, i, i < HEAD)
        keys = (row // n * KV + head // (H // KV)) * slots * HEAD
        best = tl.full([], float("-inf"), tl.float32)
        weight = tl.zeros([], tl.float32)
        value = tl.zeros([BLOCK_D], tl.float32)
        for start in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, last + 1), BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)
            at, seen = keys + s[:, None] * HEAD + i[None, :], (s <= last)[:, None] & (i < HEAD)[None, :]
            score = tl.sum(tl.load(k_cache + at, seen, 0).to(tl.float32) * asked[None, :], 1)
            score = tl.where(s <= last, score, float("-inf"))
            grown = tl.maximum(best, tl.max(score, 0))
            fade, p = tl.exp(best - grown), tl.exp(score - grown)
            value = value * fade + tl.sum(p[:, None] * tl.load(v_cache + at, seen, 0).to(tl.float32), 0)
            weight = weight * fade + tl.sum(p, 0)
            best = grown
        to = query.to(tl.int64) * splits + split
        tl.store(peak + to, best)
        tl.store(mass + to, weight)
        tl.store(part + to * HEAD + i, value, i < HEAD)


@triton.jit
def project_kernel(
    part, peak, mass, position, weight, bias, h, update, weight_scale, stop, rows, n, C, splits,
    H: tl.constexpr, HEAD: tl.constexpr, BIAS: tl.constexpr, POST: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, DTYPE: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """The splits of attention joined, in their order, and projected; added to the state unless it is to be normed."""
    _begun(PDL)
    blocks = tl.cdiv(rows, BLOCK_M)
    row = (tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    out = tl.program_id(0) // blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    if stop is None:
        inside, base = row < rows, tl.load(position)
        used, most = (base + row % n) // SPLIT + 1, (base + n - 1) // SPLIT + 1
    else:
        slot, inside = _place(position, stop, row, n, rows)
        if _none(inside):
            return
        used = slot // SPLIT + 1
        most = tl.max(tl.where(inside, used, 0), 0)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for head in range(0, H):
        at = (row * H + head) * splits
        best = tl.full([BLOCK_M], float("-inf"), tl.float32)
        for split in range(0, most):
            best = tl.maximum(best, tl.load(peak + at + split, inside & (split < used), float("-inf")))
        best = tl.where(inside, best, 0.0)
        for start in range(0, HEAD, BLOCK_K):
            i = start + tl.arange(0, BLOCK_K)
            value = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
            share = tl.zeros([BLOCK_M], tl.float32)
            for split in range(0, most):
                here = inside & (split < used)
                by = tl.exp(tl.load(peak + at + split, here, float("-inf")) - best)
                share += by * tl.load(mass + at + split, here, 0.0)
                place = (at + split)[:, None] * HEAD + i[None, :]
                value += by[:, None] * tl.load(part + place, here[:, None] & (i < HEAD)[None, :], 0.0)
            value = value / tl.where(inside, share, 1.0)[:, None]
            known = (i < HEAD)[:, None] & (out < C)[None, :]
            w = tl.load(weight + out[None, :].to(tl.int64) * (H * HEAD) + head * HEAD + i[:, None], known, 0)
            total = _product(value, _decoded(w, DTYPE), total)
    total = _scaled(total, weight_scale, out, out < C)
    _add(total, bias, h, update, row, out, rows, C, BIAS, POST)


@triton.jit
def _add(total, bias, h, update, row, out, rows, C, BIAS: tl.constexpr, POST: tl.constexpr):
    """Product with its bias onto the state, or as an update that is to be normed."""
    if BIAS:
        total += _vector(bias, out, out < C)[None, :]
    at, inside = row[:, None] * C + out[None, :], (row < rows)[:, None] & (out < C)[None, :]
    if POST:
        tl.store(update + at, total, inside)
    else:
        tl.store(h + at, tl.load(h + at, inside, 0) + total, inside)


@triton.jit
def up_kernel(
    h, total, update, post, norm_weight, norm_bias, weight, bias, gate, gate_bias, hidden, weight_scale, gate_scale,
    position, stop, rows, n, C, width,
    NORM: tl.constexpr, POST: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, DTYPE: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Norm and the first half of the MLP."""
    _begun(PDL)
    blocks = tl.cdiv(rows, BLOCK_M)
    column = tl.program_id(0) // blocks
    row = (tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    out = (column * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    if stop is not None:  # noqa: SIM102, a compile-time condition
        if _none(_place(position, stop, row, n, rows)[1]):
            return
    factor, mean, size = _statistics(h, update, post, row, rows, C, NORM, POST, BLOCK_M, BLOCK_K)
    found = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    gates = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, C, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        x = _entering(h, update, post, factor, row, c, rows, C, POST)
        if POST:
            inside = (row < tl.where(column == 0, rows, 0))[:, None] & (c < C)[None, :]
            tl.store(total + row[:, None] * C + c[None, :], x, inside)
        x = _normed(x, mean, size, norm_weight, norm_bias, c, C, NORM)
        found = _product(x, _columns(weight, out, c, width, C, DTYPE), found)
        if GATED:
            gates = _product(x, _columns(gate, out, c, width, C, DTYPE), gates)
    found = _scaled(found, weight_scale, out, out < width)
    gates = _scaled(gates, gate_scale, out, out < width)
    if BIAS:
        found += _vector(bias, out, out < width)[None, :]
        if GATED:
            gates += _vector(gate_bias, out, out < width)[None, :]
    if GATED:
        inner = 0.7978845608028654 * (gates + 0.044715 * gates * gates * gates)
        found *= 0.5 * gates * (1 + tanh(inner))
    else:
        found *= 0.5 * (1 + tl.erf(found * 0.7071067811865476))
    at = row[:, None] * width + out[None, :]
    tl.store(hidden + at, found, (row < rows)[:, None] & (out < width)[None, :])


@triton.jit
def down_kernel(
    x, weight, bias, h, update, weight_scale, position, stop, rows, n, C, width,
    BIAS: tl.constexpr, POST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """A product and its sum with the state."""
    _begun(PDL)
    blocks = tl.cdiv(rows, BLOCK_M)
    row = (tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    out = (tl.program_id(0) // blocks * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    if stop is not None:  # noqa: SIM102, a compile-time condition
        if _none(_place(position, stop, row, n, rows)[1]):
            return
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, width, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        total = _product(_tile(x, row, c, rows, width), _columns(weight, out, c, C, width, DTYPE), total)
    total = _scaled(total, weight_scale, out, out < C)
    _add(total, bias, h, update, row, out, rows, C, BIAS, POST)
