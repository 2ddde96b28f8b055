"""Quasi-Newton steps of one sample in Triton. The algorithm is that of ../quasi_newton.py."""

import triton
import triton.language as tl

from ..quasi_newton import FORGET as _FORGET
from ..quasi_newton import RIDGE as _RIDGE
from ..quasi_newton import SMALLEST_MOVE

FORGET, RIDGE = tl.constexpr(_FORGET), tl.constexpr(_RIDGE)
SMALLEST_SQUARE = tl.constexpr(SMALLEST_MOVE**2)


@triton.jit
def _near(moves, offsets, token, inside, first, D, inputs, BLOCK_I: tl.constexpr):
    """Moves of the neighbours of some tokens side by side, zero of those before `first`."""
    i = tl.arange(0, BLOCK_I)
    back = tl.load(offsets + i // D, i < inputs, 0)
    of = token[:, None] - back[None, :]
    known = (inside[:, None] & (i < inputs)[None, :]) & (of >= first)
    return tl.load(moves + of * D + (i % D)[None, :], known, 0.0)


@triton.jit
def _learn(
    y, spread, log_sigma, moves, outputs, gram, cross, model, offsets, first, count, before, D, inputs,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Fit the model to what the last sweep's moves, of tokens from `before` on, did to the first `count` tokens."""
    i, d, m = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M)
    square, wide = i[:, None] * BLOCK_I + i[None, :], i[:, None] * BLOCK_D + d[None, :]
    of_log_sigma = BLOCK_I * BLOCK_D
    largest = 0.0
    for begin in range(0, count, BLOCK_M):
        near = _near(moves, offsets, first + begin + m, begin + m < count, before, D, inputs, BLOCK_I)
        largest = tl.maximum(largest, tl.max(tl.sum(near * near, 1), 0))
    a = tl.load(gram + square) * FORGET
    mu, log = tl.load(cross + wide) * FORGET, tl.load(cross + of_log_sigma + wide) * FORGET
    for begin in range(0, count, BLOCK_M):
        t = begin + m
        near = _near(moves, offsets, first + t, t < count, before, D, inputs, BLOCK_I)
        size = tl.sum(near * near, 1)
        known = (t < count)[:, None] & (d < D)[None, :]
        now, old = t[:, None] * D + d[None, :], (first + t)[:, None] * 2 * D + d[None, :]
        by_mu = tl.load(y + now, known, 0) - tl.load(spread + now, known, 0) - tl.load(outputs + old, known, 0)
        by_log = tl.load(log_sigma + now, known, 0) - tl.load(outputs + old + D, known, 0)
        # Not a number, or infinite.
        wild = tl.max(((by_mu - by_mu != 0) | (by_log - by_log != 0)).to(tl.int32), 1) > 0
        teaches = (size > SMALLEST_SQUARE * largest) & (wild == 0)
        by_mu, by_log = tl.where(teaches[:, None], by_mu, 0.0), tl.where(teaches[:, None], by_log, 0.0)
        # Every token counts the same, however far it is from its solution.
        weighed = tl.trans(near * tl.where(teaches, 1 / size, 0.0)[:, None])
        a = tl.dot(weighed, near, a, input_precision="ieee")
        mu = tl.dot(weighed, by_mu, mu, input_precision="ieee")
        log = tl.dot(weighed, by_log, log, input_precision="ieee")
    tl.store(gram + square, a)
    tl.store(cross + wide, mu)
    tl.store(cross + of_log_sigma + wide, log)
    diagonal = i[:, None] == i[None, :]
    mean = tl.sum(tl.sum(tl.where(diagonal, a, 0.0), 1), 0) / inputs
    a = tl.where(diagonal, tl.where(i < inputs, RIDGE * mean, 1.0)[:, None] + a, a)
    usable = mean > 0
    # Gauss-Jordan; positive definite matrices need no pivots.
    for j in range(0, inputs):
        row = tl.sum(tl.where((i == j)[:, None], a, 0.0), 0)
        pivot = tl.sum(tl.where(i == j, row, 0.0), 0)
        usable = usable & (pivot > 0) & (pivot - pivot == 0)
        share = tl.where(i == j, 0.0, tl.sum(tl.where((i == j)[None, :], a, 0.0), 1) / pivot)
        mu -= share[:, None] * tl.sum(tl.where((i == j)[:, None], mu, 0.0), 0)[None, :]
        log -= share[:, None] * tl.sum(tl.where((i == j)[:, None], log, 0.0), 0)[None, :]
        a -= share[:, None] * row[None, :]
    pivots = tl.sum(tl.where(diagonal, a, 0.0), 1)[:, None]
    if usable:
        tl.store(model + wide, mu / pivots)
        tl.store(model + of_log_sigma + wide, log / pivots)


@triton.jit
def _newton(
    x, y, spread, log_sigma, most, learned, moves, outputs, gram, cross, model, offsets, b, first, count, n, T, D,
    inputs, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """x of sample b's window: y and what the model says that the moves of earlier tokens do to it, at most `most`."""
    d, size = tl.arange(0, BLOCK_D), BLOCK_I * BLOCK_D
    x, y, spread, log_sigma = x + (b * T + first) * D, y + b * n * D, spread + b * n * D, log_sigma + b * n * D
    moves, outputs, gram = moves + b * T * D, outputs + b * T * 2 * D, gram + b * BLOCK_I * BLOCK_I
    cross, model = cross + b * 2 * size, model + b * 2 * size
    known = tl.minimum(first + count, tl.load(learned + 2 * b + 1)) - first
    if known > 0:
        _learn(y, spread, log_sigma, moves, outputs, gram, cross, model, offsets, first, known,
               tl.load(learned + 2 * b), D, inputs, BLOCK_M, BLOCK_D, BLOCK_I)  # fmt: skip
    tl.store(learned + 2 * b, first)
    tl.store(learned + 2 * b + 1, first + count)
    tl.debug_barrier()
    wide = tl.arange(0, BLOCK_I)[:, None] * BLOCK_D + d[None, :]
    to_mu, to_log = tl.load(model + wide), tl.load(model + size + wide)
    one = tl.arange(0, 1)
    for t in range(0, count):
        # The move of the token before was stored by other threads.
        tl.debug_barrier()
        near = tl.sum(_near(moves, offsets, first + t + one, one == 0, first, D, inputs, BLOCK_I), 0)
        at = t * D + d
        value, noise, old = (tl.load(y + at, d < D, 0), tl.load(spread + at, d < D, 0), tl.load(x + at, d < D, 0))
        by = tl.sum(near[:, None] * to_mu, 0) + noise * tl.sum(near[:, None] * to_log, 0)
        new = value + tl.minimum(tl.maximum(by, -most), most)
        tl.store(moves + (first + t) * D + d, new - old, d < D)
        tl.store(x + at, new, d < D)
        of = (first + t) * 2 * D + d
        tl.store(outputs + of, value - noise, d < D)
        tl.store(outputs + of + D, tl.load(log_sigma + at, d < D, 0), d < D)
