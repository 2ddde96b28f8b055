// Matrix products y = x W^T with weights packed as [N / 16][K][16] in float32, in tiles of 16 columns. In bfloat16 they
// are packed as [N / 64][K / 2][64][2], in the order in which they are read: groups of up to four tiles.
// The order of a sum depends neither on the number of rows nor on the tile shape nor on the thread: k ascending, one
// fused multiply-add after the other, in blocks of K_BLOCK whose sums are added in order. So a row has the same bits in
// every batch.
#pragma once

#include <type_traits>

#include "vec.h"
#include "workspace.h"

namespace starflow::STARFLOW_ISA {

constexpr int K_BLOCK = 256;
constexpr int MAX_ROWS = ACCUMULATORS < MOST_ROWS ? ACCUMULATORS : MOST_ROWS;
constexpr int MAX_TILES = ACCUMULATORS < 4 ? ACCUMULATORS : 4;
// Column tiles per pass over x.
constexpr int GROUP = SCRATCH_COLUMNS / LANES;
// Distance in bytes by which products of few rows prefetch grouped weights.
constexpr int64_t FETCHED = 8192;

struct Bf16 {
    uint16_t bits;
};

// Two bfloat16 values in the place of a float, the one of even k in the lower half. They are multiplied by pairs of
// inputs that are rounded as well, so that a product has half as many terms.
struct Bf16Pair {
    uint32_t bits;
};

// Returns how many tiles of 16 columns fit into the registers for `rows` rows.
constexpr int tiles_for(int rows) { return ACCUMULATORS / rows < MAX_TILES ? ACCUMULATORS / rows : MAX_TILES; }

// Whether tiles lie side by side, term by term, and the distance between two tiles of a group, in values.
template <class W>
constexpr bool GROUPED = !std::is_same_v<W, float>;
template <class W>
constexpr int64_t TILE = LANES * sizeof(float) / sizeof(W);

// Prefetches the next weights while the present ones are used, `step` bytes further for each k.
struct Ahead {
    const char* at;
    int64_t step, stride;

    // LOCALITY: 3 for the inner cache, which is faster for float32 weights although it does not hold them all, and for
    // products of few rows, which soon read what they fetch; 2 for an outer one.
    template <int LOCALITY, int TILES>
    INLINE void fetch(int64_t k) const {
        UNROLL
        for (int t = 0; t < TILES; ++t) __builtin_prefetch(at + k * step + t * stride, 0, LOCALITY);
    }
};

// Weights that the caller multiplies with next; stride: distance of two tiles.
struct Following {
    const float* at;
    int64_t stride;
};

// Prefetches memory that the caller reads next, `bytes` per tile, when the weights are in cache already.
struct Stream {
    const char* at;
    int64_t bytes;

    // Distributes `count` floats over a product of M rows, `tiles` column tiles and sums of K terms.
    Stream(const float* next, int64_t count, int64_t M, int64_t tiles, int64_t K)
        : at(reinterpret_cast<const char*>(next)) {
        int64_t parts = ((M + MAX_ROWS - 1) / MAX_ROWS) * ((tiles + MAX_TILES - 1) / MAX_TILES);
        parts *= (K + K_BLOCK - 1) / K_BLOCK;
        bytes = parts ? count * int64_t(sizeof(float)) / parts : 0;
    }
};

// stride: distance in values between two tiles, or of grouped weights between two terms.
template <int ROWS, int TILES>
INLINE void multiply(const float* x, int64_t ldx, const float* w, int64_t stride, int64_t K, Ahead ahead,
                     Vec (&sum)[ROWS][TILES]) {
    for (int64_t k = 0; k < K; ++k) {
        // With few rows there is no time for it between loads, and the hardware prefetcher does better.
        if constexpr (ROWS >= 4) ahead.fetch<3, TILES>(k);
        Vec b[TILES];
        UNROLL
        for (int t = 0; t < TILES; ++t) b[t] = load(w + t * stride + k * LANES);
        UNROLL
        for (int m = 0; m < ROWS; ++m) {
            Vec a = splat(x[m * ldx + k]);
            UNROLL
            for (int t = 0; t < TILES; ++t) sum[m][t] = fma(a, b[t], sum[m][t]);
        }
    }
}

// A bf16 is the upper half of a float; a pair of them shares one 32-bit lane, even k in the lower half.
template <int ROWS, int TILES>
INLINE void multiply(const float* x, int64_t ldx, const Bf16* w, int64_t stride, int64_t K, Ahead ahead,
                     Vec (&sum)[ROWS][TILES]) {
    auto half = [&](int64_t k, auto widen) __attribute__((always_inline)) {
        Vec b[TILES];
        UNROLL
        for (int t = 0; t < TILES; ++t) {
            Int pair;
            memcpy(&pair, w + t * TILE<Bf16> + k / 2 * 2 * stride, sizeof pair);
            b[t] = bits(widen(pair));
        }
        UNROLL
        for (int m = 0; m < ROWS; ++m) {
            Vec a = splat(x[m * ldx + k]);
            UNROLL
            for (int t = 0; t < TILES; ++t) sum[m][t] = fma(a, b[t], sum[m][t]);
        }
    };
    auto even = [](Int pair) __attribute__((always_inline)) { return pair << 16; };
    auto odd = [](Int pair) __attribute__((always_inline)) { return pair & splat(int32_t(0xffff0000)); };
    int64_t k = 0;
    for (; k + 1 < K; k += 2) {
        ahead.fetch<ROWS >= 4 ? 2 : 3, TILES>(k);
        half(k, even), half(k + 1, odd);
    }
    if (k < K) half(k, even);
}

#if defined(__AVX512F__)
// Adds both products of each pair; in assembly, since the other kernels of this instruction set must do without it.
INLINE Vec add_products(Vec a, Vec b, Vec sum) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum.part[0]) : "v"(a.part[0]), "v"(b.part[0]));
    return sum;
}

INLINE Vec round_pairs(Vec low, Vec high) {
    asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(low.part[0]) : "v"(low.part[0]), "v"(high.part[0]));
    return low;
}

template <int ROWS, int TILES>
INLINE void multiply(const float* x, int64_t ldx, const Bf16Pair* w, int64_t stride, int64_t K, Ahead ahead,
                     Vec (&sum)[ROWS][TILES]) {
    for (int64_t k = 0; k < K; ++k) {
        ahead.fetch<ROWS >= 4 ? 2 : 3, TILES>(k);
        Vec b[TILES];
        UNROLL
        for (int t = 0; t < TILES; ++t)
            b[t] = load(reinterpret_cast<const float*>(w + t * TILE<Bf16Pair> + k * stride));
        UNROLL
        for (int m = 0; m < ROWS; ++m) {
            Vec a = splat(x[m * ldx + k]);
            UNROLL
            for (int t = 0; t < TILES; ++t) sum[m][t] = add_products(a, b[t], sum[m][t]);
        }
    }
}

// Rounds x (M, K) to pairs of bfloat16 values, and fills the last vector of each row up with zeros.
inline void round_rows(const float* x, int64_t ldx, int64_t M, int64_t K, float* to, int64_t ldto) {
    for (int64_t m = 0; m < M; ++m)
        for (int64_t k = 0; k < K; k += 2 * LANES) {
            const float* from = x + m * ldx + k;
            Vec high = K - k > LANES ? load(from + LANES, int(K - k) - LANES) : splat(0.0f);
            store(to + m * ldto + k / 2, round_pairs(load(from, int(K - k)), high));
        }
}
#endif

// Computes y = x w, or y += x w, over one block of k, K <= K_BLOCK.
template <int ROWS, int TILES, class W>
__attribute__((noinline)) void tile(const float* x, int64_t ldx, const W* w, int64_t stride, int64_t K, Ahead ahead,
                                    float* y, int64_t ldy, bool add) {
    Vec sum[ROWS][TILES];
    UNROLL
    for (int m = 0; m < ROWS; ++m) {
        UNROLL
        for (int t = 0; t < TILES; ++t) sum[m][t] = splat(0.0f);
    }
    multiply(x, ldx, w, stride, K, ahead, sum);
    UNROLL
    for (int m = 0; m < ROWS; ++m) {
        UNROLL
        for (int t = 0; t < TILES; ++t) {
            float* to = y + m * ldy + t * LANES;
            store(to, add ? load(to) + sum[m][t] : sum[m][t]);
        }
    }
}

template <class W>
using TileFunction = void (*)(const float*, int64_t, const W*, int64_t, int64_t, Ahead, float*, int64_t, bool);

template <class W, int ROWS, int TILES>
constexpr TileFunction<W> tile_or_null() {
    if constexpr (ROWS <= MAX_ROWS && TILES <= tiles_for(ROWS))
        return tile<ROWS, TILES, W>;
    else
        return nullptr;
}

#define TILE_ROW(W, R) \
    {tile_or_null<W, R, 1>(), tile_or_null<W, R, 2>(), tile_or_null<W, R, 3>(), tile_or_null<W, R, 4>()}
template <class W>
constexpr TileFunction<W> TILES_OF[6][4] = {TILE_ROW(W, 1), TILE_ROW(W, 2), TILE_ROW(W, 3),
                                            TILE_ROW(W, 4), TILE_ROW(W, 5), TILE_ROW(W, 6)};
#undef TILE_ROW

// Computes y (M, 16 tiles) = x (M, K) times `tiles` tiles of packed weights.
template <class W>
void product_tiles(const float* x, int64_t ldx, int64_t M, const W* w, int64_t stride, int64_t K, int tiles, float* y,
                   int64_t ldy, Stream* stream = nullptr, const Following* following = nullptr) {
    int64_t tile = GROUPED<W> ? TILE<W> : stride, term = GROUPED<W> ? stride : LANES;
    for (int64_t k = 0; k < K || k == 0; k += K_BLOCK) {
        int64_t width = K - k < K_BLOCK ? K - k : K_BLOCK;
        int64_t passes = (M + MAX_ROWS - 1) / MAX_ROWS, line = term * sizeof(W);
        // The next weights are the same columns further down, or other columns. Each pass over rows fetches a part.
        // Columns with few terms fit into the caches whole, so that unequal blocks of terms are fetched evenly.
        bool whole = !GROUPED<W> && K <= 2 * K_BLOCK, last = k + width >= K;
        const W* next = w + (whole ? tiles * tile + k * term : last && !GROUPED<W> ? tiles * tile : (k + width) * term);
        int64_t apart = tile * int64_t(sizeof(W)) / (GROUPED<W> ? passes : 1);
        if constexpr (!GROUPED<W>)
            if (following && (whole || last))
                next = following->at + (whole ? k * term : 0), apart = following->stride * int64_t(sizeof(W));
        for (int64_t pass = 0; pass < passes; ++pass) {
            int64_t m = M * pass / passes;
            int rows = int(M * (pass + 1) / passes - m);
            for (int t = 0; t < tiles;) {
                int count = tiles - t < tiles_for(rows) ? tiles - t : tiles_for(rows);
                const W* from = w + t * tile + k * term;
                Ahead ahead{reinterpret_cast<const char*>(next) + t * apart + pass * width * line / passes,
                            line / passes, apart};
                if (stream)
                    ahead = {stream->at, stream->bytes / width, 0}, stream->at += stream->bytes;
                else if (passes == 1 && GROUPED<W>)
                    ahead.at = reinterpret_cast<const char*>(from) + FETCHED;
                else if (passes == 1)
                    ahead = {reinterpret_cast<const char*>(x), 0, 0};
                TileFunction<W> run = TILES_OF<W>[rows - 1][count - 1];
                run(x + m * ldx + k, ldx, from, stride, width, ahead, y + m * ldy + t * LANES, ldy, k > 0);
                t += count;
            }
        }
    }
}

// Calls done(row, tile, value) for every row and every column tile in [first, last) of x (M, K) times packed weights.
// scratch: M rows of GROUP * LANES floats.
template <class Done>
INLINE void product(const float* x, int64_t ldx, int64_t M, const float* w, int64_t K, int64_t first, int64_t last,
                    float* scratch, Done done, Stream* stream = nullptr, const Following* following = nullptr) {
    int64_t stride = K * LANES;
    constexpr int64_t width = GROUP * LANES;
    for (int64_t tile = first; tile < last; tile += GROUP) {
        int count = int(last - tile < GROUP ? last - tile : GROUP);
        product_tiles(x, ldx, M, w + tile * stride, stride, K, count, scratch, width, stream,
                      tile + GROUP < last ? nullptr : following);
        for (int64_t m = 0; m < M; ++m)
            for (int t = 0; t < count; ++t) done(m, tile + t, load(scratch + m * width + t * LANES));
    }
}

// The same for grouped weights with `tiles` column tiles.
template <class W, class Done>
INLINE void grouped_product(const float* x, int64_t ldx, int64_t M, const W* w, int64_t K, int64_t tiles, int64_t first,
                            int64_t last, float* scratch, Done done) {
    constexpr int64_t width = GROUP * LANES, PAIR = sizeof(float) / sizeof(W);
    int64_t terms = (K + PAIR - 1) / PAIR * PAIR;
    for (int64_t tile = first; tile < last;) {
        int64_t group = tile / GROUP * GROUP, end = group + GROUP < tiles ? group + GROUP : tiles;
        int count = int((last < end ? last : end) - tile);
        const W* from = w + group * terms * LANES + (tile - group) * TILE<W>;
        product_tiles(x, ldx, M, from, (end - group) * LANES, K, count, scratch, width);
        for (int64_t m = 0; m < M; ++m)
            for (int t = 0; t < count; ++t) done(m, tile + t, load(scratch + m * width + t * LANES));
        tile += count;
    }
}

}  // namespace starflow::STARFLOW_ISA
