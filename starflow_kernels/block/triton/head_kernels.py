"""Triton kernels of a token boundary: head, guidance, affine update and the next token's way into the network."""

import triton
import triton.language as tl

from ..._triton.math import sigma_of, soft_clipped
from .step_kernels import _begun, _columns, _entering, _normed, _product, _statistics, _vector


@triton.jit
def _embed(
    tokens, weight, bias, table, cond, place, h, row, to, samples, C, D,
    COPIES: tl.constexpr, TABLE: tl.constexpr, COND: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Projection of a tile of tokens, with the position at `place` and condition, to the rows of the samples."""
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros([tokens.shape[0], BLOCK_N], tl.float32)
    total = _product(tokens, _columns(weight, to, d, C, D), total) + _vector(bias, to, to < C)[None, :]
    if TABLE:
        total += _vector(table + place, to, to < C)[None, :]
    inside = (row < samples)[:, None] & (to < C)[None, :]
    for copy in tl.static_range(COPIES):
        at = (row + copy * samples)[:, None] * C + to[None, :]
        value = total
        if COND:
            value += tl.load(cond + at, inside, 0)
        tl.store(h + at, value, inside)


@triton.jit
def embed_kernel(
    x, weight, bias, table, cond, h, samples, stride, C, D,
    COPIES: tl.constexpr, TABLE: tl.constexpr, COND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """The first token of every sample, `stride` values apart, into slot 0."""
    _begun(PDL)
    blocks = tl.cdiv(samples, BLOCK_M)
    row = (tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    to, d = tl.program_id(0) // blocks * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    tokens = tl.load(x + row[:, None] * stride + d[None, :], (row < samples)[:, None] & (d < D)[None, :], 0)
    _embed(tokens.to(tl.float32), weight, bias, table, cond, 0, h, row, to, samples, C, D,
           COPIES, TABLE, COND, BLOCK_N, BLOCK_D)  # fmt: skip


@triton.jit
def _raw(
    h, update, post, norm_weight, weight, bias, row, d, rows, C, D, clip,
    SCALE: tl.constexpr, CLIPPED: tl.constexpr, NORM: tl.constexpr, POST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Raw outputs a and b of the rows, values d."""
    factor, mean, size = _statistics(h, update, post, row, rows, C, NORM, POST, BLOCK_M, BLOCK_K)
    a = tl.zeros([BLOCK_M, d.shape[0]], tl.float32)
    b = tl.zeros([BLOCK_M, d.shape[0]], tl.float32)
    skip = 0 if SCALE == "unit" else D
    for start in range(0, C, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        x = _entering(h, update, post, factor, row, c, rows, C, POST)
        x = _normed(x, mean, size, norm_weight, norm_weight, c, C, NORM)
        b = _product(x, _columns(weight + skip * C, d, c, D, C), b)
        if SCALE != "unit":
            a = _product(x, _columns(weight, d, c, D, C), a)
    b += _vector(bias + skip, d, d < D)[None, :]
    if SCALE != "unit":
        a += _vector(bias, d, d < D)[None, :]
    return soft_clipped(a, clip, CLIPPED), soft_clipped(b, clip, CLIPPED)


@triton.jit
def _gaussian(
    h, update, post, norm_weight, weight, bias, guidance, row, d, at, known, samples, C, D, clip,
    SCALE: tl.constexpr, CLIPPED: tl.constexpr, NORM: tl.constexpr, POST: tl.constexpr, COPIES: tl.constexpr,
    RULE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Mean and scale of values d of the rows' tokens; rows without the condition stand `samples` later, the weights of
    guidance at `at`."""
    rows = samples * COPIES
    a, b = _raw(h, update, post, norm_weight, weight, bias, row, d, rows, C, D, clip, SCALE, CLIPPED, NORM, POST,
                BLOCK_M, BLOCK_K)  # fmt: skip
    if COPIES == 2:
        plain_a, plain_b = _raw(h, update, post, norm_weight, weight, bias, row + samples, d, rows, C, D, clip,
                                SCALE, CLIPPED, NORM, POST, BLOCK_M, BLOCK_K)  # fmt: skip
        w = tl.load(guidance + at, known, 0)[:, None]
        if RULE == "tarflow":
            b = b + w * (b - plain_b)
            sigma, _ = sigma_of(a + w * (a - plain_a), SCALE)
        else:
            sigma, _ = sigma_of(a, SCALE)
            other, _ = sigma_of(plain_a, SCALE)
            s = tl.minimum(sigma / other, 1.0)
            s = s * s
            precision = 1 + w - w * s
            b = ((1 + w) * b - w * s * plain_b) / precision
            sigma = sigma / tl.sqrt(precision)
    else:
        sigma, _ = sigma_of(a, SCALE)
    return b, sigma


@triton.jit
def head_kernel(
    h, update, post, norm_weight, weight, bias, z, guidance, x, next_h, in_weight, in_bias, table, cond, position,
    samples, T, prefix, C, D, clip,
    SCALE: tl.constexpr, CLIPPED: tl.constexpr, NORM: tl.constexpr, POST: tl.constexpr, COPIES: tl.constexpr,
    RULE: tl.constexpr, START: tl.constexpr, TABLE: tl.constexpr, COND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """The token that the outputs of this slot belong to, and its projection into the next slot.

    Every program computes the whole token and BLOCK_N channels of its projection: the next slot then needs no launch of
    its own. The next position goes to the second place, as the first one is still read.
    """
    _begun(PDL)
    blocks = tl.cdiv(samples, BLOCK_M)
    column = tl.program_id(0) // blocks
    row = (tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    base = tl.load(position)
    slot = base - prefix
    token = slot if START else slot + 1
    known = row < tl.where(token < T, samples, 0)
    inside = known[:, None] & (d < D)[None, :]
    mu, sigma = _gaussian(h, update, post, norm_weight, weight, bias, guidance, row, d, row * T + token, known, samples,
                          C, D, clip, SCALE, CLIPPED, NORM, POST, COPIES, RULE, BLOCK_M, BLOCK_K)  # fmt: skip
    at = (row * T + token)[:, None] * D + d[None, :]
    value = tl.where(inside, mu + sigma * tl.load(z + at, inside, 0), 0.0)
    mine = row < tl.where((column == 0) & (token < T), samples, 0)
    tl.store(x + at, value, mine[:, None] & (d < D)[None, :])
    to = column * BLOCK_N + tl.arange(0, BLOCK_N)
    place = tl.minimum(slot + 1, T - 1).to(tl.int64) * C
    _embed(value, in_weight, in_bias, table, cond, place, next_h, row, to, samples, C, D,
           COPIES, TABLE, COND, BLOCK_N, BLOCK_D)  # fmt: skip
    if tl.program_id(0) == 0:
        tl.store(position + 1, base + 1)
