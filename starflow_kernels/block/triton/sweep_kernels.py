"""Triton kernels of a Jacobi sweep, beside those of triton_step.py: tokens in, attention of a window, parameters to
values, and what the sweep has settled, each sample for itself.

Row r is token r % n of the window of sequence r // n. Sample b has its first `done` tokens settled; its window begins
there, in slot `position`, and ends before slot `stop`.
"""

import triton
import triton.language as tl

from .head_kernels import _gaussian
from .newton_kernels import _newton
from .step_kernels import _columns, _none, _place, _product, _vector

INFINITY = tl.constexpr(float("inf"))


@triton.jit
def embed_kernel(
    x, start, weight, bias, table, cond, h, position, stop, samples, rows, n, T, prefix, C, D,
    START: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The tokens that the slots of the windows take in, projected; both copies of a sample take the same."""
    blocks = tl.cdiv(rows, BLOCK_M)
    row = (tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    to, d = tl.program_id(0) // blocks * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    slot, inside = _place(position, stop, row, n, rows)
    if _none(inside):
        return
    place = slot - prefix
    token = place - 1 if START else place
    at = (row // n % samples * T + token)[:, None] * D + d[None, :]
    tokens = tl.load(x + at, (inside & (token >= 0))[:, None] & (d < D)[None, :], 0)
    if START:
        first = _vector(start, d, d < D)
        tokens = tl.where((token < 0)[:, None], first[None, :], tokens)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    total = _product(tokens, _columns(weight, to, d, C, D), total) + _vector(bias, to, to < C)[None, :]
    known = inside[:, None] & (to < C)[None, :]
    if table is not None:
        total += tl.load(table + place[:, None] * C + to[None, :], known, 0).to(tl.float32)
    if cond is not None:
        total += tl.load(cond + (row // n)[:, None] * C + to[None, :], known, 0)
    tl.store(h + row[:, None] * C + to[None, :], total, known)


@triton.jit
def attend_kernel(
    q, k_cache, v_cache, position, stop, part, peak, mass, n, slots, splits,
    H: tl.constexpr, KV: tl.constexpr, HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head and window over the keys of one split, which they read once."""
    tiles = n // BLOCK_M
    split = tl.program_id(0) % splits
    head = tl.program_id(0) // splits % H
    tile = tl.program_id(0) // splits // H
    sequence = (tile // tiles).to(tl.int64)
    m, i = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    row, end = sequence * n + tile % tiles * BLOCK_M + m, tl.load(stop + sequence)
    first = tl.load(position + sequence) + tile % tiles * BLOCK_M
    slot = first + m
    last = tl.minimum(first + BLOCK_M, end) - 1
    if (first < end) & (split * SPLIT <= last):
        inside = slot < end
        at = (row * H + head)[:, None] * HEAD + i[None, :]
        asked = tl.load(q + at, inside[:, None] & (i < HEAD)[None, :], 0)
        keys = (sequence * KV + head // (H // KV)) * slots * HEAD
        best = tl.full([BLOCK_M], float("-inf"), tl.float32)
        weight = tl.zeros([BLOCK_M], tl.float32)
        value = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, last + 1), BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)
            seen, read = (s <= last)[:, None] & (i < HEAD)[None, :], keys + s[:, None] * HEAD + i[None, :]
            score = _product(
                asked, tl.trans(tl.load(k_cache + read, seen, 0)), tl.zeros([BLOCK_M, BLOCK_S], tl.float32)
            )
            score = tl.where(s[None, :] <= slot[:, None], score, float("-inf"))
            grown = tl.maximum(best, tl.max(score, 1))
            # A query that comes before all keys so far has no largest score.
            level = tl.where(grown == float("-inf"), 0.0, grown)
            fade, p = tl.exp(best - level), tl.exp(score - level[:, None])
            value = _product(p, tl.load(v_cache + read, seen, 0), value * fade[:, None])
            weight = weight * fade + tl.sum(p, 1)
            best = grown
        to, mine = (row * H + head) * splits + split, inside & (split * SPLIT <= slot)
        tl.store(peak + to, best, mine)
        tl.store(mass + to, weight, mine)
        tl.store(part + to[:, None] * HEAD + i[None, :], value, mine[:, None] & (i < HEAD)[None, :])


@triton.jit
def head_kernel(
    h, update, post, norm_weight, weight, bias, z, guidance, x, y, spread, log_sigma, change, move, size,
    position, stop, samples, n, T, prefix, C, D, clip,
    SCALE: tl.constexpr, CLIPPED: tl.constexpr, NORM: tl.constexpr, POST: tl.constexpr, COPIES: tl.constexpr,
    RULE: tl.constexpr, START: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y = mu + sigma z of the windows' tokens; of each token the largest change against x, relative and absolute, and
    the largest value, infinite for NaN."""
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    slot, inside = _place(position, stop, row, n, samples * n)
    if _none(inside):
        return
    at = row // n * T + slot - prefix + (0 if START else 1)
    changed = tl.zeros([BLOCK_M], tl.float32)
    moved = tl.zeros([BLOCK_M], tl.float32)
    largest = tl.zeros([BLOCK_M], tl.float32)
    # Some values of the tokens at a time: all of wide ones do not fit into registers.
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mu, sigma = _gaussian(h, update, post, norm_weight, weight, bias, guidance, row, d, at, inside, samples * n, C,
                              D, clip, SCALE, CLIPPED, NORM, POST, COPIES, RULE, BLOCK_M, BLOCK_K)  # fmt: skip
        known = inside[:, None] & (d < D)[None, :]
        noise = sigma * tl.load(z + at[:, None] * D + d[None, :], known, 0)
        value, to = mu + noise, row[:, None] * D + d[None, :]
        tl.store(y + to, value, known)
        if spread is not None:
            tl.store(spread + to, noise, known)
            tl.store(log_sigma + to, tl.log(sigma), known)
        by = tl.where(known, tl.abs(value - tl.load(x + at[:, None] * D + d[None, :], known, 0)), 0.0)
        by = tl.where(by == by, by, INFINITY)
        value = tl.where(known, tl.abs(value), 0.0)
        value = tl.where(value == value, value, INFINITY)
        relative = tl.where(by == INFINITY, by, by / tl.maximum(value, 1.0))
        changed, moved = tl.maximum(changed, tl.max(relative, 1)), tl.maximum(moved, tl.max(by, 1))
        largest = tl.maximum(largest, tl.max(value, 1))
    tl.store(change + row, changed, inside)
    tl.store(move + row, moved, inside)
    tl.store(size + row, largest, inside)


@triton.jit
def settle_kernel(
    x, y, spread, log_sigma, change, move, size, bound, tol, done, single, passes, fallbacks, failed, sweeps, residual,
    position, stop, learned, moves, outputs, gram, cross, model, offsets, samples, n, T, prefix, D, inputs,
    WINDOW: tl.constexpr, SLIDE: tl.constexpr, START: tl.constexpr, COPIES: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """What a sweep has done for one sample: values, counters, how many tokens stand still, and the next window."""
    b = tl.program_id(0).to(tl.int64)
    first, alone = tl.load(done + b), tl.load(single + b)
    if first >= T:
        return
    count = tl.load(stop + b) - tl.load(position + b)
    # What all threads have read now, some of them write below.
    tl.debug_barrier()
    i = tl.arange(0, BLOCK_W)
    inside = i < count
    row = b * n + i
    largest = tl.max(tl.load(size + row, inside, 0.0), 0)
    tl.store(passes + b, tl.load(passes + b) + 1)
    tl.store(sweeps + b * T + first + i, tl.load(sweeps + b * T + first + i, inside, 0) + 1, inside)
    after = first
    if (count > 1) & (largest > tl.load(bound + b)):
        alone = first + count
        tl.store(single + b, alone)
        tl.store(fallbacks + b, tl.load(fallbacks + b) + 1)
        if offsets is not None:
            tl.store(learned + 2 * b + 1, 0)
    else:
        changed = tl.load(change + row, inside, 0.0)
        moving = tl.min(tl.where(inside & ((changed > tl.load(tol)) | (i == count - 1)), i, BLOCK_W), 0)
        tl.store(residual + b, tl.maximum(tl.load(residual + b), tl.max(tl.where(i < moving, changed, 0.0), 0)))
        after = first + moving + 1
        if offsets is not None:
            _newton(x, y, spread, log_sigma, tl.max(tl.load(move + row, inside, 0.0), 0), learned, moves, outputs, gram,
                    cross, model, offsets, b, first, count, n, T, D, inputs, BLOCK_D, BLOCK_I)  # fmt: skip
        else:
            d = tl.arange(0, BLOCK_D)
            for begin in range(0, count, BLOCK_M):
                t = begin + tl.arange(0, BLOCK_M)
                known = (t < count)[:, None] & (d < D)[None, :]
                value = tl.load(y + (b * n + t)[:, None] * D + d[None, :], known, 0)
                tl.store(x + (b * T + first + t)[:, None] * D + d[None, :], value, known)
        if largest == INFINITY:
            tl.store(failed + b, first + 1)
            after = T
        tl.store(done + b, after)
    end = tl.minimum(after + WINDOW if SLIDE else (after // WINDOW + 1) * WINDOW, T)
    end = tl.where(after < alone, after + 1, end)
    skipped = prefix - (0 if START else 1)
    for copy in tl.static_range(COPIES):
        tl.store(position + copy * samples + b, after + skipped)
        tl.store(stop + copy * samples + b, end + skipped)
