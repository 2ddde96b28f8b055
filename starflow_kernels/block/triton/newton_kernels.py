"""Quasi-Newton steps of one sample in Triton. The algorithm is that of ../quasi_newton.py."""

import triton
import triton.language as tl

from ...solve_inverse.quasi_newton import FORGET as _FORGET
from ...solve_inverse.quasi_newton import RIDGE as _RIDGE
from ...solve_inverse.quasi_newton import SMALLEST_MOVE

FORGET, RIDGE = tl.constexpr(_FORGET), tl.constexpr(_RIDGE)
SMALLEST_SQUARE = tl.constexpr(SMALLEST_MOVE**2)


@triton.jit
def _near(moves, offsets, token, first, D, inputs, BLOCK_I: tl.constexpr):
    """Moves of a token's neighbours side by side, zero of those before `first`."""
    i = tl.arange(0, BLOCK_I)
    of = token - tl.load(offsets + i // D, i < inputs, 0)
    return tl.load(moves + of * D + i % D, (i < inputs) & (of >= first), 0.0)


@triton.jit
def _taught(
    y, spread, log_sigma, moves, outputs, offsets, t, first, before, largest, D, inputs,
    BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Moves of a token's neighbours, the same over their sum of squares, what its mean and log scale have changed by.

    Every token counts the same, however far it is from its solution; one that teaches nothing gets zeros."""
    d, old = tl.arange(0, BLOCK_D), (first + t) * 2 * D
    by_mu = tl.load(y + t * D + d, d < D, 0) - tl.load(spread + t * D + d, d < D, 0)
    by_mu -= tl.load(outputs + old + d, d < D, 0)
    by_log = tl.load(log_sigma + t * D + d, d < D, 0) - tl.load(outputs + old + D + d, d < D, 0)
    near = _near(moves, offsets, first + t, before, D, inputs, BLOCK_I)
    size = tl.sum(near * near, 0)
    wild = tl.max(((by_mu - by_mu != 0) | (by_log - by_log != 0)).to(tl.int32), 0)
    teaches = (size > SMALLEST_SQUARE * largest) & (wild == 0)
    by_mu, by_log = tl.where(teaches, by_mu, 0.0), tl.where(teaches, by_log, 0.0)
    return near, near * tl.where(teaches, 1 / size, 0.0), by_mu, by_log


@triton.jit
def _learn(
    y, spread, log_sigma, moves, outputs, gram, cross, model, offsets, first, count, before, D, inputs,
    BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Fit the model to what the last sweep's moves, of tokens from `before` on, did to the first `count` tokens.

    Token by token, mean and log scale one after the other: more at once does not fit into registers.
    """
    i, d = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_D)
    square, diagonal = i[:, None] * BLOCK_I + i[None, :], i[:, None] == i[None, :]
    largest = 0.0
    for t in range(0, count):
        near = _near(moves, offsets, first + t, before, D, inputs, BLOCK_I)
        largest = tl.maximum(largest, tl.sum(near * near, 0))
    a = tl.load(gram + square) * FORGET
    for t in range(0, count):
        near, weighed, _, _ = _taught(y, spread, log_sigma, moves, outputs, offsets, t, first, before, largest, D,
                                      inputs, BLOCK_D, BLOCK_I)  # fmt: skip
        a += weighed[:, None] * near[None, :]
    tl.store(gram + square, a)
    mean = tl.sum(tl.sum(tl.where(diagonal, a, 0.0), 1), 0) / inputs
    for half in tl.static_range(2):
        at = half * BLOCK_I * BLOCK_D + i[:, None] * BLOCK_D + d[None, :]
        x = tl.load(cross + at) * FORGET
        for t in range(0, count):
            _, weighed, by_mu, by_log = _taught(y, spread, log_sigma, moves, outputs, offsets, t, first, before,
                                                largest, D, inputs, BLOCK_D, BLOCK_I)  # fmt: skip
            x += weighed[:, None] * (by_mu if half == 0 else by_log)[None, :]
        tl.store(cross + at, x)
        # The sums were stored by other threads.
        tl.debug_barrier()
        a = tl.load(gram + square)
        a = tl.where(diagonal, tl.where(i < inputs, RIDGE * mean, 1.0)[:, None] + a, a)
        usable = mean > 0
        # Gauss-Jordan; positive definite matrices need no pivots.
        for j in range(0, inputs):
            row = tl.sum(tl.where((i == j)[:, None], a, 0.0), 0)
            pivot = tl.sum(tl.where(i == j, row, 0.0), 0)
            usable = usable & (pivot > 0) & (pivot - pivot == 0)
            share = tl.where(i == j, 0.0, tl.sum(tl.where((i == j)[None, :], a, 0.0), 1) / pivot)
            x -= share[:, None] * tl.sum(tl.where((i == j)[:, None], x, 0.0), 0)[None, :]
            a -= share[:, None] * row[None, :]
        if usable:
            tl.store(model + at, x / tl.sum(tl.where(diagonal, a, 0.0), 1)[:, None])


@triton.jit
def _newton(
    x, y, spread, log_sigma, most, learned, moves, outputs, gram, cross, model, offsets, b, first, count, n, T, D,
    inputs, BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """x of sample b's window: y and what the model says that the moves of earlier tokens do to it, at most `most`."""
    d, size = tl.arange(0, BLOCK_D), BLOCK_I * BLOCK_D
    x, y, spread, log_sigma = x + (b * T + first) * D, y + b * n * D, spread + b * n * D, log_sigma + b * n * D
    moves, outputs, gram = moves + b * T * D, outputs + b * T * 2 * D, gram + b * BLOCK_I * BLOCK_I
    cross, model = cross + b * 2 * size, model + b * 2 * size
    before, known = tl.load(learned + 2 * b), tl.minimum(first + count, tl.load(learned + 2 * b + 1)) - first
    tl.debug_barrier()
    if known > 0:
        _learn(y, spread, log_sigma, moves, outputs, gram, cross, model, offsets, first, known, before, D, inputs,
               BLOCK_D, BLOCK_I)  # fmt: skip
    tl.store(learned + 2 * b, first)
    tl.store(learned + 2 * b + 1, first + count)
    tl.debug_barrier()
    wide = tl.arange(0, BLOCK_I)[:, None] * BLOCK_D + d[None, :]
    to_mu, to_log = tl.load(model + wide), tl.load(model + size + wide)
    for t in range(0, count):
        # The move of the token before was stored by other threads.
        tl.debug_barrier()
        near = _near(moves, offsets, first + t, first, D, inputs, BLOCK_I)
        at = t * D + d
        value, noise, old = (tl.load(y + at, d < D, 0), tl.load(spread + at, d < D, 0), tl.load(x + at, d < D, 0))
        by = tl.sum(near[:, None] * to_mu, 0) + noise * tl.sum(near[:, None] * to_log, 0)
        new = value + tl.minimum(tl.maximum(by, -most), most)
        tl.store(moves + (first + t) * D + d, new - old, d < D)
        tl.store(x + at, new, d < D)
        of = (first + t) * 2 * D + d
        tl.store(outputs + of, value - noise, d < D)
        tl.store(outputs + of + D, tl.load(log_sigma + at, d < D, 0), d < D)
