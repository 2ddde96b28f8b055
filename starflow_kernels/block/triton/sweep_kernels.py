"""Triton kernels of a Jacobi sweep that differ from those of a step: embedding, attention, head, and convergence.

Row r is token r % n of the window of sequence r // n. The first `done` tokens of a sample have converged. Its window
begins after them, in slot `position`, and ends before slot `stop`.
"""

import triton
import triton.language as tl

from .head_kernels import mean_and_scale
from .newton_kernels import newton_step
from .tiles import add_product, is_last_arrival, load_vector, load_weight, none_inside, window_slots
from .wide_newton_kernels import wide_newton_step

INFINITY = tl.constexpr(float("inf"))


@triton.jit(do_not_specialize=("samples", "rows", "n", "T", "prefix"))
def block_sweep_embed_kernel(
    x, start, weight, bias, table, cond, cond_stride, h, position, stop, samples, rows, n, T, prefix, C, D,
    START: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Project the input tokens of the slots in the windows; both branches of a sample take the same tokens."""
    blocks = tl.cdiv(rows, BLOCK_M)
    row = (tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    channel = tl.program_id(0) // blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    slot, inside = window_slots(position, stop, row, n, rows)
    if none_inside(inside):
        return
    index = slot - prefix
    token = index - 1 if START else index
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin in range(0, D, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        offsets = (row // n % samples * T + token)[:, None] * D + d[None, :]
        tokens = tl.load(x + offsets, (inside & (token >= 0))[:, None] & (d < D)[None, :], 0)  # (BLOCK_M, BLOCK_D)
        if START:
            first = load_vector(start, d, d < D)
            tokens = tl.where((token < 0)[:, None], first[None, :], tokens)
        total = add_product(tokens, load_weight(weight, channel, d, C, D), total)  # (BLOCK_M, BLOCK_N)
    total += load_vector(bias, channel, channel < C)[None, :]
    known = inside[:, None] & (channel < C)[None, :]
    if table is not None:
        total += tl.load(table + index[:, None] * C + channel[None, :], known, 0).to(tl.float32)  # (BLOCK_M, BLOCK_N)
    if cond is not None:
        cond_offset = tl.where(cond_stride == C, 0, index * C)
        # (BLOCK_M, BLOCK_N)
        total += tl.load(cond + (row // n * cond_stride + cond_offset)[:, None] + channel[None, :], known, 0)
    tl.store(h + row[:, None] * C + channel[None, :], total, known)


@triton.jit(do_not_specialize=("n", "slots", "splits"))
def block_sweep_attend_kernel(
    q, k_cache, v_cache, position, stop, split_out, split_max, split_sum, tickets, attended, n, slots, splits,
    H: tl.constexpr, KV: tl.constexpr, HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Attend with BLOCK_M queries of one head and window to one split of the keys, which are read once.

    The last program of the queries joins their splits in order.
    """
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
        q_offsets = (row * H + head)[:, None] * HEAD + i[None, :]
        queries = tl.load(q + q_offsets, inside[:, None] & (i < HEAD)[None, :], 0)  # (BLOCK_M, BLOCK_D)
        cache_start = (sequence * KV + head // (H // KV)) * slots * HEAD
        best = tl.full([BLOCK_M], float("-inf"), tl.float32)
        weight = tl.zeros([BLOCK_M], tl.float32)
        value = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, last + 1), BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)
            seen, offsets = (s <= last)[:, None] & (i < HEAD)[None, :], cache_start + s[:, None] * HEAD + i[None, :]
            k = tl.load(k_cache + offsets, seen, 0)  # (BLOCK_S, BLOCK_D)
            score = add_product(queries, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_S], tl.float32))  # (BLOCK_M, BLOCK_S)
            score = tl.where(s[None, :] <= slot[:, None], score, float("-inf"))
            highest = tl.maximum(best, tl.max(score, 1))
            # A query that has seen no key yet has no largest score.
            base = tl.where(highest == float("-inf"), 0.0, highest)
            kept, p = tl.exp(best - base), tl.exp(score - base[:, None])
            v = tl.load(v_cache + offsets, seen, 0)  # (BLOCK_S, BLOCK_D)
            value = add_product(p, v, value * kept[:, None])  # (BLOCK_M, BLOCK_D)
            weight = weight * kept + tl.sum(p, 1)
            best = highest
        split_offsets, used = (row * H + head) * splits + split, inside & (split * SPLIT <= slot)
        tl.store(split_max + split_offsets, best, used)
        tl.store(split_sum + split_offsets, weight, used)
        tl.store(split_out + split_offsets[:, None] * HEAD + i[None, :], value, used[:, None] & (i < HEAD)[None, :])
        programs = last // SPLIT + 1
        if is_last_arrival(tickets + tile * H + head, programs):
            best = tl.full([BLOCK_M], float("-inf"), tl.float32)
            weight = tl.zeros([BLOCK_M], tl.float32)
            value = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            for part in range(0, programs):
                split_offsets, used = (row * H + head) * splits + part, inside & (part * SPLIT <= slot)
                most = tl.load(split_max + split_offsets, used, float("-inf"))  # (BLOCK_M,)
                highest = tl.maximum(best, most)
                base = tl.where(inside, highest, 0.0)
                kept, share = tl.exp(best - base), tl.exp(most - base)
                weight = weight * kept + share * tl.load(split_sum + split_offsets, used, 0.0)
                known = used[:, None] & (i < HEAD)[None, :]
                # (BLOCK_M, BLOCK_D)
                value = value * kept[:, None] + share[:, None] * tl.load(
                    split_out + split_offsets[:, None] * HEAD + i[None, :], known, 0.0
                )
                best = highest
            value = value / tl.where(inside, weight, 1.0)[:, None]
            tl.store(attended + q_offsets, value, inside[:, None] & (i < HEAD)[None, :])


@triton.jit(do_not_specialize=("samples", "n", "T", "prefix"))
def block_sweep_head_kernel(
    h, residual, post, statistics, norm_weight, weight, bias, z, guidance, x, y, log_scales, spread, log_sigma,
    change, move, size, position, stop, samples, n, T, prefix, C, D, clip,
    SCALE: tl.constexpr, CLIPPED: tl.constexpr, NORM: tl.constexpr, POST: tl.constexpr, TILES: tl.constexpr,
    BRANCHES: tl.constexpr, RULE: tl.constexpr, START: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store y = mu + sigma z for the tokens in the windows.

    Also store, per token, the largest change from x, relative and absolute, and the largest value. All three are
    infinite for NaN.
    """
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    slot, inside = window_slots(position, stop, row, n, samples * n)
    if none_inside(inside):
        return
    token_offsets = row // n * T + slot - prefix + (0 if START else 1)
    changed = tl.zeros([BLOCK_M], tl.float32)
    moved = tl.zeros([BLOCK_M], tl.float32)
    largest = tl.zeros([BLOCK_M], tl.float32)
    # Take BLOCK_D values at a time, because all values of a wide token do not fit into registers.
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mu, sigma, log_scale = mean_and_scale(
            h, residual, post, statistics, norm_weight, weight, bias, guidance, row, d, token_offsets, inside,
            samples * n, C, D, clip, SCALE, CLIPPED, NORM, POST, TILES, BRANCHES, RULE, BLOCK_M, BLOCK_K,
        )  # fmt: skip
        known = inside[:, None] & (d < D)[None, :]
        tl.store(log_scales + token_offsets[:, None] * D + d[None, :], log_scale, known)
        if spread is not None:
            tl.store(log_sigma + row[:, None] * D + d[None, :], log_scale, known)
        noise = sigma * tl.load(z + token_offsets[:, None] * D + d[None, :], known, 0)  # (BLOCK_M, BLOCK_D)
        value, y_offsets = mu + noise, row[:, None] * D + d[None, :]
        tl.store(y + y_offsets, value, known)
        if spread is not None:
            tl.store(spread + y_offsets, noise, known)
        old = tl.load(x + token_offsets[:, None] * D + d[None, :], known, 0)  # (BLOCK_M, BLOCK_D)
        absolute = tl.where(known, tl.abs(value - old), 0.0)
        absolute = tl.where(absolute == absolute, absolute, INFINITY)
        value = tl.where(known, tl.abs(value), 0.0)
        value = tl.where(value == value, value, INFINITY)
        relative = tl.where(absolute == INFINITY, absolute, absolute / tl.maximum(value, 1.0))
        changed, moved = tl.maximum(changed, tl.max(relative, 1)), tl.maximum(moved, tl.max(absolute, 1))
        largest = tl.maximum(largest, tl.max(value, 1))
    tl.store(change + row, changed, inside)
    tl.store(move + row, moved, inside)
    tl.store(size + row, largest, inside)


@triton.jit(do_not_specialize=("samples", "n", "T", "prefix", "inputs"))
def block_sweep_settle_kernel(
    x, y, spread, log_sigma, change, move, size, bound, tol, done, single, passes, fallbacks, failed, sweeps,
    solve_residual, position, stop, learned, moves, outputs, gram, cross, model, system, solution, weights,
    offsets, samples, n, T, prefix, D, inputs,
    WINDOW: tl.constexpr, SLIDE: tl.constexpr, START: tl.constexpr, BRANCHES: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr,
    SIDE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Store the results of a sweep for one sample: values, counters, number of converged tokens, next window.

    SIDE, WIDTH, TILE: padded sizes of a linear model that does not fit into registers and of its tiles, else 0.
    """
    b = tl.program_id(0).to(tl.int64)
    first, alone = tl.load(done + b), tl.load(single + b)
    if first >= T:
        return
    count = tl.load(stop + b) - tl.load(position + b)
    # Wait: all threads must have read before some of them write below.
    tl.debug_barrier()
    i = tl.arange(0, BLOCK_W)
    inside = i < count
    row = b * n + i
    largest = tl.max(tl.load(size + row, inside, 0.0), 0)  # of (BLOCK_W,)
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
        changed = tl.load(change + row, inside, 0.0)  # (BLOCK_W,)
        moving = tl.min(tl.where(inside & ((changed > tl.load(tol)) | (i == count - 1)), i, BLOCK_W), 0)
        largest_change = tl.maximum(tl.load(solve_residual + b), tl.max(tl.where(i < moving, changed, 0.0), 0))
        tl.store(solve_residual + b, largest_change)
        after = first + moving + 1
        if offsets is not None:
            most = tl.max(tl.load(move + row, inside, 0.0), 0)
            if TILE == 0:
                newton_step(x, y, spread, log_sigma, most, learned, moves, outputs, gram, cross, model, offsets, b,
                            first, count, n, T, D, inputs, BLOCK_D, BLOCK_I)  # fmt: skip
            else:
                wide_newton_step(x, y, spread, log_sigma, most, learned, moves, outputs, gram, cross, model, system,
                                 solution, weights, offsets, b, first, count, n, T, D, inputs, SIDE, WIDTH, TILE,
                                 BLOCK_D, BLOCK_I)  # fmt: skip
        else:
            for begin in range(0, count, BLOCK_M):
                t = begin + tl.arange(0, BLOCK_M)
                for begin_d in range(0, D, BLOCK_D):
                    d = begin_d + tl.arange(0, BLOCK_D)
                    known = (t < count)[:, None] & (d < D)[None, :]
                    value = tl.load(y + (b * n + t)[:, None] * D + d[None, :], known, 0)  # (BLOCK_M, BLOCK_D)
                    tl.store(x + (b * T + first + t)[:, None] * D + d[None, :], value, known)
        if largest == INFINITY:
            tl.store(failed + b, first + 1)
            after = T
        tl.store(done + b, after)
    end = tl.minimum(after + WINDOW if SLIDE else (after // WINDOW + 1) * WINDOW, T)
    end = tl.where(after < alone, after + 1, end)
    skipped = prefix - (0 if START else 1)
    for branch in tl.static_range(BRANCHES):
        tl.store(position + branch * samples + b, after + skipped)
        tl.store(stop + branch * samples + b, end + skipped)
