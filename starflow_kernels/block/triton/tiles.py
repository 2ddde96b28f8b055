"""Functions that the Triton kernels of a block share: loads, products and norms of tiles of rows.

A row is one token of one sequence. A tile has BLOCK_M rows. Tile sizes and the order of every sum are fixed, so that a
row has the same bits in any batch.
"""

import triton
import triton.language as tl

from ..._core.numerics import NORM_EPS
from ..._triton.math import inverse_root, mean_of

RMS_EPS = tl.constexpr(NORM_EPS["rms_norm"])
LAYER_EPS = tl.constexpr(NORM_EPS["layer_norm"])
# Most values per row of a weight that a program prefetches.
PREFETCHED = tl.constexpr(1024)
# Outputs per tile of a product into the state. Each row has statistics per tile.
PRODUCT_N = tl.constexpr(32)


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Wait for the previous kernel and let the next one start, if programmatic dependent launch is used."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch_weight(weight, out, start, end, outs, width, PDL: tl.constexpr):
    """Bring up to PREFETCHED values per row `out` of a weight (outs, width), from `start` to `end`, into the L2 cache.

    Weights do not change during a step, so this is done while the previous kernel still runs, if PDL.
    """
    if PDL:
        LINE: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth
        c = tl.minimum(start + tl.arange(0, PREFETCHED // LINE) * LINE, end - 1)
        pointers = weight + (tl.minimum(out, outs - 1)[:, None] * width + c[None, :])  # (outputs, lines)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64)], tl.int32, is_pure=False, pack=1
        )


@triton.jit
def window_slots(position, stop, row, n, rows):
    """Return the cache slots of the rows of a sweep, and which rows are inside their windows."""
    slot = tl.load(position + row // n, row < rows, 0) + row % n  # (BLOCK_M,)
    return slot, slot < tl.load(stop + row // n, row < rows, 0)


@triton.jit
def none_inside(inside):
    """Return whether no row is inside its window."""
    return tl.max(inside.to(tl.int32), 0) == 0


@triton.jit
def is_last_arrival(ticket, programs):
    """Count this program in a ticket and return whether it is the last of `programs`, which sees what all have stored.

    The last program sets the ticket to 0 for the next launch.
    """
    # The atomic of one thread publishes the stores of all threads only after a barrier.
    tl.debug_barrier()
    last = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(ticket, 0)
    return last


@triton.jit
def load_tile(x, row, c, rows, width):
    """Return the columns c of some rows as float32, zero outside the tensor."""
    # (rows, columns)
    return tl.load(x + row[:, None] * width + c[None, :], (row < rows)[:, None] & (c < width)[None, :], 0).to(
        tl.float32
    )


@triton.jit
def load_vector(x, i, mask):
    """Return the values i of a vector as float32, zero outside the mask."""
    return tl.load(x + i, mask, 0).to(tl.float32)  # (values,)


@triton.jit
def decode_weights(w, DTYPE: tl.constexpr):
    """Return one-byte weights as DTYPE, not yet scaled; other weights are returned unchanged.

    uint8 holds the bits of float8_e4m3fn. Shifted to the matching bits of float16, they give 1/256 of the value, also
    if it is subnormal; the scale contains the factor 256. No target needs a special instruction for this.
    """
    if w.dtype == tl.int8:
        return w.to(DTYPE)
    elif w.dtype == tl.uint8:
        bits = (w.to(tl.int8, bitcast=True).to(tl.int16) << 7) & -16385
        return bits.to(tl.float16, bitcast=True).to(DTYPE)
    else:
        return w


@triton.jit
def load_weight(weight, out, c, outs, width, DTYPE: tl.constexpr = None):
    """Return the transposed tile (columns, outputs) of a weight (outs, width)."""
    # (columns, outputs)
    w = tl.load(weight + out[None, :] * width + c[:, None], (out < outs)[None, :] & (c < width)[:, None], 0)
    return decode_weights(w, DTYPE)


@triton.jit
def scale_channels(total, scale, out, mask):
    """Multiply sums of products with one-byte weights by the scales of their channels; without scale, return total."""
    if scale is not None:
        total *= load_vector(scale, out, mask)[None, :]
    return total


@triton.jit
def add_product(x, w, total):
    """Return total + x w in the dtype of w."""
    return tl.dot(x.to(w.dtype), w, total, input_precision="ieee")  # (rows, outputs)


@triton.jit
def load_state(h, residual, post, factor, row, c, rows, C, POST: tl.constexpr):
    """Return the state of the rows; if POST, norm the residual and add it."""
    x = load_tile(h, row, c, rows, C)
    if POST:
        x += load_tile(residual, row, c, rows, C) * factor[:, None] * (1 + load_vector(post, c, c < C))[None, :]
    return x


@triton.jit
def store_statistics(statistics, value, row, column, rows, C):
    """Store the sum of a tile (BLOCK_M, PRODUCT_N) per row, and the sum of squared distances from its mean.

    statistics: (rows, tiles, 2).
    """
    count = tl.minimum(C - column * PRODUCT_N, PRODUCT_N)
    known = (tl.arange(0, PRODUCT_N) < count)[None, :]
    total = tl.sum(tl.where(known, value, 0.0), 1)
    distance = tl.where(known, value - mean_of(total, count)[:, None], 0.0)
    offsets = 2 * (row * tl.cdiv(C, PRODUCT_N) + column)
    tl.store(statistics + offsets, total, row < rows)
    tl.store(statistics + offsets + 1, tl.sum(distance * distance, 1), row < rows)


@triton.jit
def merged_statistics(statistics, row, rows, C, TILES: tl.constexpr):
    """Return the mean of the rows and the sum of squared distances from it, (BLOCK_M,) each; TILES: per iteration."""
    tiles = tl.cdiv(C, PRODUCT_N)
    first = (statistics + 2 * row * tiles)[:, None]
    mean = tl.zeros([row.shape[0]], tl.float32)
    square = tl.zeros([row.shape[0]], tl.float32)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        known = (row < rows)[:, None] & (tile < tiles)[None, :]
        mean += tl.sum(tl.load(first + 2 * tile[None, :], known, 0.0), 1)  # of (BLOCK_M, TILES)
    mean = mean_of(mean, C)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        known = (row < rows)[:, None] & (tile < tiles)[None, :]
        count = tl.maximum(tl.minimum(C - tile * PRODUCT_N, PRODUCT_N), 0)
        # (BLOCK_M, TILES) each
        distance = tl.load(first + 2 * tile[None, :], known, 0.0) * mean_of(1.0, tl.maximum(count, 1))[None, :]
        distance -= mean[:, None]
        part = tl.load(first + 2 * tile[None, :] + 1, known, 0.0) + count[None, :] * distance * distance
        square += tl.sum(part, 1)
    return mean, square


@triton.jit
def norm_statistics(
    h, residual, post, statistics, row, rows, C, NORM: tl.constexpr, POST: tl.constexpr, TILES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return the factor of the residual's norm, and the mean and factor of the state's norm, (BLOCK_M,) each.

    statistics: of the tiles of the residual if POST, else of the state. TILES: tiles per iteration, 0 if no product has
    stored their statistics.
    """
    factor = tl.full([BLOCK_M], 1.0, tl.float32)
    mean = tl.zeros([BLOCK_M], tl.float32)
    size = tl.full([BLOCK_M], 1.0, tl.float32)
    if POST:
        center, square = merged_statistics(statistics, row, rows, C, TILES)
        factor = inverse_root(mean_of(square, C) + center * center + RMS_EPS)
    if NORM != "none":
        if POST or TILES == 0:
            # A loop without tl.dot loads ahead only if it asks for stages; with post-norms, that spills registers.
            STAGES: tl.constexpr = 1 if POST else 3
            if NORM == "layer_norm":
                for start in tl.range(0, C, BLOCK_K, num_stages=STAGES):
                    c = start + tl.arange(0, BLOCK_K)
                    mean += tl.sum(load_state(h, residual, post, factor, row, c, rows, C, POST), 1)
                mean = mean_of(mean, C)
            square = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
            for start in tl.range(0, C, BLOCK_K, num_stages=STAGES):
                c = start + tl.arange(0, BLOCK_K)
                x = load_state(h, residual, post, factor, row, c, rows, C, POST)  # (BLOCK_M, BLOCK_K)
                x = tl.where((c < C)[None, :], x - mean[:, None], 0.0)
                square += x * x
            square = mean_of(tl.sum(square, 1), C)
        else:
            mean, square = merged_statistics(statistics, row, rows, C, TILES)
            square = mean_of(square, C)
            if NORM == "rms_norm":
                square += mean * mean
        size = inverse_root(square + (LAYER_EPS if NORM == "layer_norm" else RMS_EPS))
    return factor, mean, size


@triton.jit
def normalize(x, mean, size, weight, bias, c, C, NORM: tl.constexpr):
    """Return the normalized tile (BLOCK_M, BLOCK_K), from its statistics."""
    if NORM == "layer_norm":
        x = (x - mean[:, None]) * size[:, None] * load_vector(weight, c, c < C)[None, :]
        x += load_vector(bias, c, c < C)[None, :]
    if NORM == "rms_norm":
        x = x * size[:, None] * (1 + load_vector(weight, c, c < C))[None, :]
    return x
