"""Triton kernels between two steps: head, guidance, affine transform, and the projection of the next token."""

import triton
import triton.language as tl

from ..._triton.math import sigma_of, soft_clipped
from .tiles import (
    add_product,
    load_state,
    load_vector,
    load_weight,
    norm_statistics,
    normalize,
    wait_for_previous,
)


@triton.jit
def _store_states(
    total, bias, table, cond, table_offset, cond_offset, cond_stride, h, row, channel, samples, C,
    BRANCHES: tl.constexpr, TABLE: tl.constexpr, COND: tl.constexpr,
):  # fmt: skip
    """Add bias, position and condition to a tile of projected tokens; store it for all branches of the samples."""
    total += load_vector(bias, channel, channel < C)[None, :]
    if TABLE:
        total += load_vector(table + table_offset, channel, channel < C)[None, :]
    inside = (row < samples)[:, None] & (channel < C)[None, :]
    for branch in tl.static_range(BRANCHES):
        branch_row = (row + branch * samples)[:, None]
        value = total
        if COND:
            # (BLOCK_M, BLOCK_N)
            value += tl.load(cond + cond_offset + branch_row * cond_stride + channel[None, :], inside, 0)
        tl.store(h + branch_row * C + channel[None, :], value, inside)


@triton.jit(do_not_specialize=("samples", "stride"))
def block_embed_kernel(
    x, weight, bias, table, cond, cond_stride, h, samples, stride, C, D,
    BRANCHES: tl.constexpr, TABLE: tl.constexpr, COND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Project the first token of every sample; the tokens are `stride` values apart."""
    wait_for_previous(PDL)
    blocks = tl.cdiv(samples, BLOCK_M)
    row = (tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    channel = tl.program_id(0) // blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        # (BLOCK_M, BLOCK_D)
        tokens = tl.load(x + row[:, None] * stride + d[None, :], (row < samples)[:, None] & (d < D)[None, :], 0)
        # (BLOCK_M, BLOCK_N)
        total = add_product(tokens.to(tl.float32), load_weight(weight, channel, d, C, D), total)
    _store_states(total, bias, table, cond, 0, 0, cond_stride, h, row, channel, samples, C, BRANCHES, TABLE, COND)


@triton.jit
def _raw(
    h, residual, post, statistics, norm_weight, weight, bias, row, d, rows, C, D, clip,
    SCALE: tl.constexpr, CLIPPED: tl.constexpr, NORM: tl.constexpr, POST: tl.constexpr, TILES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return the clipped raw a and b of the rows, for the values d of a token."""
    factor, mean, size = norm_statistics(
        h, residual, post, statistics, row, rows, C, NORM, POST, TILES, BLOCK_M, BLOCK_K
    )
    a = tl.zeros([BLOCK_M, d.shape[0]], tl.float32)
    b = tl.zeros([BLOCK_M, d.shape[0]], tl.float32)
    skip = 0 if SCALE == "unit" else D
    for start in range(0, C, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        x = load_state(h, residual, post, factor, row, c, rows, C, POST)  # (BLOCK_M, BLOCK_K)
        x = normalize(x, mean, size, norm_weight, norm_weight, c, C, NORM)
        # (BLOCK_M, values) each
        b = add_product(x, load_weight(weight + skip * C, d, c, D, C), b)
        if SCALE != "unit":
            a = add_product(x, load_weight(weight, d, c, D, C), a)
    b += load_vector(bias + skip, d, d < D)[None, :]
    if SCALE != "unit":
        a += load_vector(bias, d, d < D)[None, :]
    return soft_clipped(a, clip, CLIPPED), soft_clipped(b, clip, CLIPPED)


@triton.jit
def mean_and_scale(
    h, residual, post, statistics, norm_weight, weight, bias, guidance, row, d, token_offsets, known, samples, C, D,
    clip,
    SCALE: tl.constexpr, CLIPPED: tl.constexpr, NORM: tl.constexpr, POST: tl.constexpr, TILES: tl.constexpr,
    BRANCHES: tl.constexpr, RULE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return mean, scale and log scale of the values d of each row's token.

    token_offsets: index of each row's token, which selects its guidance weight. The branch of a row without the
    condition is `samples` rows later.
    """
    rows = samples * BRANCHES
    a, b = _raw(h, residual, post, statistics, norm_weight, weight, bias, row, d, rows, C, D, clip, SCALE, CLIPPED,
                NORM, POST, TILES, BLOCK_M, BLOCK_K)  # fmt: skip
    if BRANCHES == 2:
        # Outputs of the branch without the condition.
        plain_a, plain_b = _raw(h, residual, post, statistics, norm_weight, weight, bias, row + samples, d, rows, C, D,
                                clip, SCALE, CLIPPED, NORM, POST, TILES, BLOCK_M, BLOCK_K)  # fmt: skip
        w = tl.load(guidance + token_offsets, known, 0)[:, None]  # (BLOCK_M, 1)
        if RULE == "tarflow":
            b = b + w * (b - plain_b)
            sigma, log_sigma = sigma_of(a + w * (a - plain_a), SCALE)
        else:
            sigma, log_sigma = sigma_of(a, SCALE)
            plain_sigma, _ = sigma_of(plain_a, SCALE)
            if RULE == "itarflow":
                b = b + w * (b - plain_b)
                sigma = sigma + w * (sigma - plain_sigma)
                log_sigma = tl.log(tl.abs(sigma))
            else:
                s = tl.minimum(tl.div_rn(sigma, plain_sigma), 1.0)
                s = s * s
                precision = 1 + w - w * s
                b = tl.div_rn((1 + w) * b - w * s * plain_b, precision)
                sigma = tl.div_rn(sigma, tl.sqrt_rn(precision))
                log_sigma -= 0.5 * tl.log(precision)
    else:
        sigma, log_sigma = sigma_of(a, SCALE)
    return b, sigma, log_sigma


@triton.jit
def _token(
    total, start, h, residual, post, statistics, norm_weight, weight, bias, z, guidance, known_tokens, x, log_scales,
    in_weight, row, column, channel, token, samples, T, C, D, clip,
    SCALE: tl.constexpr, CLIPPED: tl.constexpr, NORM: tl.constexpr, POST: tl.constexpr, TILES: tl.constexpr,
    BRANCHES: tl.constexpr, RULE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_D values of a token of each row, and return total plus their part of its projection."""
    d = start + tl.arange(0, BLOCK_D)
    known = row < tl.where(token < T, samples, 0)
    inside = known[:, None] & (d < D)[None, :]
    mu, sigma, log_sigma = mean_and_scale(
        h, residual, post, statistics, norm_weight, weight, bias, guidance, row, d, row * T + token, known, samples, C,
        D, clip, SCALE, CLIPPED, NORM, POST, TILES, BRANCHES, RULE, BLOCK_M, BLOCK_K,
    )  # fmt: skip
    offsets = (row * T + token)[:, None] * D + d[None, :]
    given = token < tl.load(known_tokens + row, known, 0)
    # Only the programs of the first column store the token.
    stored = row < tl.where((column == 0) & (token < T), samples, 0)
    computed = stored[:, None] & (d < D)[None, :]
    tl.store(log_scales + offsets, tl.where(given[:, None], 0.0, log_sigma), computed)
    noise = tl.load(z + offsets, inside, 0)  # (BLOCK_M, BLOCK_D)
    value = tl.where(inside, tl.where(given[:, None], noise, mu + sigma * noise), 0.0)
    tl.store(x + offsets, value, computed)
    return add_product(value, load_weight(in_weight, channel, d, C, D), total)  # (BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=("samples", "T", "prefix"))
def block_head_kernel(
    h, residual, post, statistics, norm_weight, weight, bias, z, guidance, known_tokens, x, log_scales, h_in, in_weight,
    in_bias, table, cond, cond_stride, position, samples, T, prefix, C, D, clip,
    SCALE: tl.constexpr, CLIPPED: tl.constexpr, NORM: tl.constexpr, POST: tl.constexpr, TILES: tl.constexpr,
    BRANCHES: tl.constexpr, RULE: tl.constexpr, START: tl.constexpr, TABLE: tl.constexpr, COND: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Compute the token that the outputs of this slot belong to, and its projection for the next slot.

    Every program computes the whole token and BLOCK_N channels of its projection, so that the projection needs no
    separate launch. WHOLE: whether BLOCK_D values are the whole token; else the token is computed in parts. The next
    position goes to position[1], because other programs still read position[0].
    """
    wait_for_previous(PDL)
    blocks = tl.cdiv(samples, BLOCK_M)
    column = tl.program_id(0) // blocks
    row = (tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    channel = column * BLOCK_N + tl.arange(0, BLOCK_N)
    base = tl.load(position)
    slot = base - prefix
    token = slot if START else slot + 1
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, BLOCK_D if WHOLE else D, BLOCK_D):
        total = _token(
            total, start, h, residual, post, statistics, norm_weight, weight, bias, z, guidance, known_tokens, x,
            log_scales, in_weight, row, column, channel, token, samples, T, C, D, clip, SCALE, CLIPPED, NORM, POST,
            TILES, BRANCHES, RULE, BLOCK_M, BLOCK_K, BLOCK_D,
        )  # fmt: skip
    table_offset = tl.minimum(slot + 1, T - 1).to(tl.int64) * C
    cond_offset = tl.where(cond_stride == C, 0, table_offset)
    _store_states(total, in_bias, table, cond, table_offset, cond_offset, cond_stride, h_in, row, channel, samples, C,
                  BRANCHES, TABLE, COND)  # fmt: skip
    if tl.program_id(0) == 0:
        tl.store(position + 1, base + 1)
