"""Quasi-Newton steps of one sample in Triton; solve_inverse/quasi_newton.py describes the algorithm."""

import triton
import triton.language as tl

from ...solve_inverse import quasi_newton

FORGET = tl.constexpr(quasi_newton.FORGET)
RIDGE = tl.constexpr(quasi_newton.RIDGE)
SMALLEST_SQUARE = tl.constexpr(quasi_newton.SMALLEST_MOVE**2)


@triton.jit
def neighbour_moves(moves, offsets, token, first, D, inputs, BLOCK_I: tl.constexpr):
    """Return the moves of a token's neighbors side by side, zero for neighbors before token `first`."""
    i = tl.arange(0, BLOCK_I)
    neighbour = token - tl.load(offsets + i // D, i < inputs, 0)  # (BLOCK_I,)
    return tl.load(moves + neighbour * D + i % D, (i < inputs) & (neighbour >= first), 0.0)  # (BLOCK_I,)


@triton.jit
def lesson(
    y, spread, log_sigma, moves, outputs, offsets, t, first, before, largest, D, inputs,
    BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Return the contribution of a token to the regression.

    It is: the moves of its neighbors, these moves times its weight, the weight, and the changes of its mean and log
    scale. The weight is 1 over the sum of squares of the moves.
    Every token has the same weight, however far it is from its solution. A token that is left out gets zeros.
    """
    d, old = tl.arange(0, BLOCK_D), (first + t) * 2 * D
    # (BLOCK_D,)
    d_mu = tl.load(y + t * D + d, d < D, 0) - tl.load(spread + t * D + d, d < D, 0)
    d_mu -= tl.load(outputs + old + d, d < D, 0)
    d_log = tl.load(log_sigma + t * D + d, d < D, 0) - tl.load(outputs + old + D + d, d < D, 0)
    near = neighbour_moves(moves, offsets, first + t, before, D, inputs, BLOCK_I)
    size = tl.sum(near * near, 0)
    wild = tl.max(((d_mu - d_mu != 0) | (d_log - d_log != 0)).to(tl.int32), 0)
    teaches = (size > SMALLEST_SQUARE * largest) & (wild == 0)
    d_mu, d_log = tl.where(teaches, d_mu, 0.0), tl.where(teaches, d_log, 0.0)
    weight = tl.where(teaches, 1 / size, 0.0)
    return near, near * weight, weight, d_mu, d_log


@triton.jit
def _learn(
    y, spread, log_sigma, moves, outputs, gram, cross, model, offsets, first, count, before, D, inputs,
    BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Fit the model: the last sweep's moves of tokens from `before` on predict the changes of the first `count` tokens.

    Tokens, and their means and log scales, are added one after the other: more at once does not fit into registers.
    """
    i, d = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_D)
    square, diagonal = i[:, None] * BLOCK_I + i[None, :], i[:, None] == i[None, :]
    largest = 0.0
    for t in range(0, count):
        near = neighbour_moves(moves, offsets, first + t, before, D, inputs, BLOCK_I)
        largest = tl.maximum(largest, tl.sum(near * near, 0))
    a = tl.load(gram + square) * FORGET  # (BLOCK_I, BLOCK_I)
    for t in range(0, count):
        near, weighed, _, _, _ = lesson(y, spread, log_sigma, moves, outputs, offsets, t, first, before, largest, D,
                                      inputs, BLOCK_D, BLOCK_I)  # fmt: skip
        a += weighed[:, None] * near[None, :]
    tl.store(gram + square, a)
    mean = tl.sum(tl.sum(tl.where(diagonal, a, 0.0), 1), 0) / inputs
    for half in tl.static_range(2):
        cells = half * BLOCK_I * BLOCK_D + i[:, None] * BLOCK_D + d[None, :]
        x = tl.load(cross + cells) * FORGET  # (BLOCK_I, BLOCK_D)
        for t in range(0, count):
            _, weighed, _, d_mu, d_log = lesson(y, spread, log_sigma, moves, outputs, offsets, t, first, before,
                                                largest, D, inputs, BLOCK_D, BLOCK_I)  # fmt: skip
            x += weighed[:, None] * (d_mu if half == 0 else d_log)[None, :]
        tl.store(cross + cells, x)
        # Wait: other threads stored the sums.
        tl.debug_barrier()
        a = tl.load(gram + square)  # (BLOCK_I, BLOCK_I)
        a = tl.where(diagonal, tl.where(i < inputs, RIDGE * mean, 1.0)[:, None] + a, a)
        usable = mean > 0
        # Gauss-Jordan elimination; a positive definite matrix needs no pivoting.
        for j in range(0, inputs):
            row = tl.sum(tl.where((i == j)[:, None], a, 0.0), 0)
            pivot = tl.sum(tl.where(i == j, row, 0.0), 0)
            usable = usable & (pivot > 0) & (pivot - pivot == 0)
            share = tl.where(i == j, 0.0, tl.sum(tl.where((i == j)[None, :], a, 0.0), 1) / pivot)
            x -= share[:, None] * tl.sum(tl.where((i == j)[:, None], x, 0.0), 0)[None, :]
            a -= share[:, None] * row[None, :]
        if usable:
            tl.store(model + cells, x / tl.sum(tl.where(diagonal, a, 0.0), 1)[:, None])


@triton.jit
def newton_step(
    x, y, spread, log_sigma, most, learned, moves, outputs, gram, cross, model, offsets, b, first, count, n, T, D,
    inputs, BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Store x of sample b's window: y plus the predicted effect of the moves of earlier tokens, limited to +-`most`."""
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
    cells = tl.arange(0, BLOCK_I)[:, None] * BLOCK_D + d[None, :]
    mu_model, log_model = tl.load(model + cells), tl.load(model + size + cells)  # (BLOCK_I, BLOCK_D) each
    for t in range(0, count):
        # Wait: other threads stored the move of the previous token.
        tl.debug_barrier()
        near = neighbour_moves(moves, offsets, first + t, first, D, inputs, BLOCK_I)
        v = t * D + d
        # (BLOCK_D,) each
        value, noise, old = tl.load(y + v, d < D, 0), tl.load(spread + v, d < D, 0), tl.load(x + v, d < D, 0)
        change = tl.sum(near[:, None] * mu_model, 0) + noise * tl.sum(near[:, None] * log_model, 0)
        new = value + tl.minimum(tl.maximum(change, -most), most)
        tl.store(moves + (first + t) * D + d, new - old, d < D)
        tl.store(x + v, new, d < D)
        output = (first + t) * 2 * D + d
        tl.store(outputs + output, value - noise, d < D)
        tl.store(outputs + output + D, tl.load(log_sigma + v, d < D, 0), d < D)
