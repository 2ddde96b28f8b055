"""Quasi-Newton steps whose linear model does not fit into registers: all matrices stay in memory, in square tiles.

The steps are those of newton_kernels.py. The model has SIDE rows and twice WIDTH columns, the numbers of inputs and of
values of a token, each padded to whole tiles.
"""

import triton
import triton.language as tl

from .newton_kernels import FORGET, RIDGE, lesson, neighbour_moves


@triton.jit
def _tile_offsets(row, column, stride, TILE: tl.constexpr):
    """Return the offsets of a square tile of a matrix."""
    i = tl.arange(0, TILE)
    return (row + i)[:, None] * stride + (column + i)[None, :]


@triton.jit
def _moves_tile(moves, offsets, first, start, count, begin, before, D, inputs, TILE: tl.constexpr):
    """Return the moves before TILE tokens; rows are tokens from first + start on, columns inputs from `begin` on."""
    t, i = start + tl.arange(0, TILE), begin + tl.arange(0, TILE)
    neighbour = first + t[:, None] - tl.load(offsets + i // D, i < inputs, 0)[None, :]
    inside = (t < count)[:, None] & (i < inputs)[None, :] & (neighbour >= before)
    return tl.load(moves + neighbour * D + (i % D)[None, :], inside, 0.0)  # (TILE, TILE)


@triton.jit
def _changes_tile(
    y, spread, log_sigma, outputs, weights, first, start, count, begin, D, half: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Return the changes of the means, or with half = 1 of the log scales, of TILE tokens that teach; else zeros."""
    t, d = start + tl.arange(0, TILE), begin + tl.arange(0, TILE)
    inside = (tl.load(weights + t, t < count, 0.0) > 0)[:, None] & (d < D)[None, :]
    cells, old = t[:, None] * D + d[None, :], (first + t)[:, None] * 2 * D + half * D + d[None, :]
    # (TILE, TILE)
    if half == 0:
        new = tl.load(y + cells, inside, 0.0) - tl.load(spread + cells, inside, 0.0)
    else:
        new = tl.load(log_sigma + cells, inside, 0.0)
    return new - tl.load(outputs + old, inside, 0.0)


@triton.jit
def _inverse(a, TILE: tl.constexpr):
    """Return the inverse of a tile (TILE, TILE) by Gauss-Jordan elimination, and whether all pivots are positive."""
    i = tl.arange(0, TILE)
    x = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    usable = tl.full([], True, tl.int1)
    for j in range(0, TILE):
        row = tl.sum(tl.where((i == j)[:, None], a, 0.0), 0)
        right = tl.sum(tl.where((i == j)[:, None], x, 0.0), 0)
        pivot = tl.sum(tl.where(i == j, row, 0.0), 0)
        usable = usable & (pivot > 0) & (pivot - pivot == 0)
        column = tl.sum(tl.where((i == j)[None, :], a, 0.0), 1)
        share = tl.where(i == j, 1 - 1 / pivot, column / pivot)
        a -= share[:, None] * row[None, :]
        x -= share[:, None] * right[None, :]
    return x, usable


@triton.jit
def _scale_row(matrix, row, first, end, stride, inverse, TILE: tl.constexpr):
    """Multiply the tiles of a row, from column `first` to `end`, by the inverse of the diagonal tile."""
    for column in range(first, end, TILE):
        cells = matrix + _tile_offsets(row, column, stride, TILE)
        tl.store(cells, tl.dot(inverse, tl.load(cells), input_precision="ieee"))


@triton.jit
def _eliminate_row(matrix, row, pivot, first, end, stride, share, TILE: tl.constexpr):
    """Subtract share times the tiles of the row `pivot` from those of a row, from column `first` to `end`."""
    for column in range(first, end, TILE):
        cells = matrix + _tile_offsets(row, column, stride, TILE)
        other = tl.load(matrix + _tile_offsets(pivot, column, stride, TILE))  # (TILE, TILE)
        tl.store(cells, tl.load(cells) - tl.dot(share, other, input_precision="ieee"))


@triton.jit
def solve_model(system, solution, SIDE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """Solve for both halves of the model by block elimination; return whether all pivots were positive."""
    usable = tl.full([], True, tl.int1)
    for pivot in range(0, SIDE, TILE):
        tl.debug_barrier()
        inverse, good = _inverse(tl.load(system + _tile_offsets(pivot, pivot, SIDE, TILE)), TILE)
        usable = usable & good
        _scale_row(system, pivot, pivot + TILE, SIDE, SIDE, inverse, TILE)
        _scale_row(solution, pivot, 0, 2 * WIDTH, 2 * WIDTH, inverse, TILE)
        # Wait: other threads stored the tiles of the row.
        tl.debug_barrier()
        for row in range(0, SIDE, TILE):
            if row != pivot:
                share = tl.load(system + _tile_offsets(row, pivot, SIDE, TILE))  # (TILE, TILE)
                _eliminate_row(system, row, pivot, pivot + TILE, SIDE, SIDE, share, TILE)
                _eliminate_row(solution, row, pivot, 0, 2 * WIDTH, 2 * WIDTH, share, TILE)
    tl.debug_barrier()
    return usable


@triton.jit
def _learn(
    y, spread, log_sigma, moves, outputs, gram, cross, model, system, solution, weights, offsets, first, count, before,
    D, inputs,
    SIDE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Fit the model, as in newton_kernels.py."""
    i = tl.arange(0, TILE)
    largest = 0.0
    for t in range(0, count):
        near = neighbour_moves(moves, offsets, first + t, before, D, inputs, BLOCK_I)
        largest = tl.maximum(largest, tl.sum(near * near, 0))
    for t in range(0, count):
        _, _, weight, _, _ = lesson(y, spread, log_sigma, moves, outputs, offsets, t, first, before, largest, D,
                                    inputs, BLOCK_D, BLOCK_I)  # fmt: skip
        tl.store(weights + t, weight)
    # Wait: other threads stored the weights.
    tl.debug_barrier()
    trace = 0.0
    for row in range(0, SIDE, TILE):
        for column in range(0, SIDE, TILE):
            cells = _tile_offsets(row, column, SIDE, TILE)
            a = tl.load(gram + cells) * FORGET  # (TILE, TILE)
            for start in range(0, count, TILE):
                weight = tl.load(weights + start + i, start + i < count, 0.0)
                left = _moves_tile(moves, offsets, first, start, count, row, before, D, inputs, TILE)
                right = _moves_tile(moves, offsets, first, start, count, column, before, D, inputs, TILE)
                a += tl.dot(tl.trans(left * weight[:, None]), right, input_precision="ieee")
            tl.store(gram + cells, a)
            tl.store(system + cells, a)
            if row == column:
                trace += tl.sum(tl.sum(tl.where(i[:, None] == i[None, :], a, 0.0), 1), 0)
        for half in tl.static_range(2):
            for begin in range(0, WIDTH, TILE):
                cells = _tile_offsets(row, half * WIDTH + begin, 2 * WIDTH, TILE)
                x = tl.load(cross + cells) * FORGET  # (TILE, TILE)
                for start in range(0, count, TILE):
                    weight = tl.load(weights + start + i, start + i < count, 0.0)
                    left = _moves_tile(moves, offsets, first, start, count, row, before, D, inputs, TILE)
                    right = _changes_tile(y, spread, log_sigma, outputs, weights, first, start, count, begin, D, half,
                                          TILE)  # fmt: skip
                    x += tl.dot(tl.trans(left * weight[:, None]), right, input_precision="ieee")
                tl.store(cross + cells, x)
                tl.store(solution + cells, x)
    mean = trace / inputs
    # Wait: other threads stored the sums.
    tl.debug_barrier()
    for row in range(0, SIDE, TILE):
        cell = system + (row + i) * (SIDE + 1)
        tl.store(cell, tl.load(cell) + tl.where(row + i < inputs, RIDGE * mean, 1.0))
    usable = solve_model(system, solution, SIDE, WIDTH, TILE)
    if usable & (mean > 0):
        for row in range(0, SIDE, TILE):
            for column in range(0, 2 * WIDTH, TILE):
                cells = _tile_offsets(row, column, 2 * WIDTH, TILE)
                tl.store(model + cells, tl.load(solution + cells))


@triton.jit
def wide_newton_step(
    x, y, spread, log_sigma, most, learned, moves, outputs, gram, cross, model, system, solution, weights, offsets, b,
    first, count, n, T, D, inputs,
    SIDE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Store x of sample b's window, as `newton_step` does."""
    x, y, spread, log_sigma = x + (b * T + first) * D, y + b * n * D, spread + b * n * D, log_sigma + b * n * D
    moves, outputs, weights = moves + b * T * D, outputs + b * T * 2 * D, weights + b * n
    gram, system = gram + b * SIDE * SIDE, system + b * SIDE * SIDE
    cross, model, solution = (
        cross + b * SIDE * 2 * WIDTH,
        model + b * SIDE * 2 * WIDTH,
        solution + b * SIDE * 2 * WIDTH,
    )
    before, known = tl.load(learned + 2 * b), tl.minimum(first + count, tl.load(learned + 2 * b + 1)) - first
    tl.debug_barrier()
    if known > 0:
        _learn(y, spread, log_sigma, moves, outputs, gram, cross, model, system, solution, weights, offsets, first,
               known, before, D, inputs, SIDE, WIDTH, TILE, BLOCK_D, BLOCK_I)  # fmt: skip
    tl.store(learned + 2 * b, first)
    tl.store(learned + 2 * b + 1, first + count)
    i = tl.arange(0, TILE)
    for t in range(0, count):
        # Wait: other threads stored the model, or the move of the previous token.
        tl.debug_barrier()
        for begin in range(0, D, TILE):
            d = begin + i
            by_mu = tl.zeros([TILE], tl.float32)
            by_log = tl.zeros([TILE], tl.float32)
            for row in range(0, SIDE, TILE):
                source = row + i
                neighbour = first + t - tl.load(offsets + source // D, source < inputs, 0)
                # (TILE,)
                near = tl.load(moves + neighbour * D + source % D, (source < inputs) & (neighbour >= first), 0.0)
                cells = _tile_offsets(row, begin, 2 * WIDTH, TILE)
                by_mu += tl.sum(near[:, None] * tl.load(model + cells), 0)
                by_log += tl.sum(near[:, None] * tl.load(model + WIDTH + cells), 0)
            v = t * D + d
            # (TILE,) each
            value, noise, old = tl.load(y + v, d < D, 0), tl.load(spread + v, d < D, 0), tl.load(x + v, d < D, 0)
            change = by_mu + noise * by_log
            new = value + tl.minimum(tl.maximum(change, -most), most)
            tl.store(moves + (first + t) * D + d, new - old, d < D)
            tl.store(x + v, new, d < D)
            output = (first + t) * 2 * D + d
            tl.store(outputs + output, value - noise, d < D)
            tl.store(outputs + output + D, tl.load(log_sigma + v, d < D, 0), d < D)
