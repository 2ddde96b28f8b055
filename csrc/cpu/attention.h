// Attention over keys and values that are stored as packed weights: keys [S / 16][d][16], values [d / 16][S][16].
// Both products are those of product.h, so a query has the same bits alone and among others.
#pragma once

#include <type_traits>

#include "product.h"
#include "rows.h"
#include "workspace.h"

namespace starflow::STARFLOW_ISA {

// Room for S tokens of one head; d and S padded to whole tiles.
struct KeyValues {
    float *keys, *values;
    int64_t S;
};

inline void append(KeyValues to, int64_t position, const float* key, const float* value, int d) {
    float* tile = to.keys + position / LANES * d * LANES + position % LANES;
    for (int i = 0; i < d; ++i) tile[i * LANES] = key[i];
    for (int i = 0; i < d; i += LANES) store(to.values + i * to.S + position * LANES, load(value + i, d - i));
}

// Does the same for the sixteen tokens from `position` on, a multiple of 16; rows are `stride` apart, d is a multiple of 16.
inline void append_tile(KeyValues to, int64_t position, const float* keys, const float* values, int64_t stride, int d) {
    for (int c = 0; c < d; c += LANES) {
        transpose(keys + c, stride, to.keys + position * d + c * LANES, LANES);
        for (int i = 0; i < LANES; ++i)
            store(to.values + c * to.S + (position + i) * LANES, load(values + i * stride + c));
    }
}

// Divides the weighted sum of values by the sum of weights.
inline void weigh(const float* sums, float total, int d, float* out) {
    Vec whole = splat(1.0f / total);
    for (int c = 0; c < d; c += LANES) store(out + c, load(sums + c) * whole, d - c);
}

// Attends with n <= MAX_ROWS queries (rows ldq apart) at positions position .. position + n - 1, each over the keys up
// to its own position. scores: n rows of S floats. sums: n rows of d, padded.
inline void attend(const float* q, int64_t ldq, int n, KeyValues kv, int64_t position, int d, float scale,
                   float* scores, float* sums, float* out, int64_t ldo) {
    int64_t keys = position + n, width = padded(d);
    product_tiles(q, ldq, n, kv.keys, d * LANES, d, int(padded(keys) / LANES), scores, kv.S);
    float total[MAX_ROWS];
    for (int i = 0; i < n; ++i) {
        int64_t seen = position + i + 1;
        total[i] = softmax(scores + i * kv.S, seen, scale);
        // Keys of later queries have weight zero.
        for (int64_t s = padded(seen); s < keys; ++s) scores[i * kv.S + s] = 0;
    }
    product_tiles(scores, kv.S, n, kv.values, kv.S * LANES, keys, int(width / LANES), sums, width);
    for (int i = 0; i < n; ++i) weigh(sums + i * width, total[i], d, out + i * ldo);
}

// Computes y[i] (16 TILES columns) = x[i] (K) times weights w[i] for several i at once, because the sums of a single
// one would wait for each other. Sums are in the order of product_tiles.
template <int ITEMS, int TILES>
__attribute__((noinline)) void tile_each(const float* const* x, const float* const* w, int64_t stride, int64_t K,
                                         int64_t column, float* const* y) {
    const float *xs[ITEMS], *ws[ITEMS];
    UNROLL
    for (int i = 0; i < ITEMS; ++i) xs[i] = x[i], ws[i] = w[i] + column / LANES * stride;
    for (int64_t begin = 0; begin < K; begin += K_BLOCK) {
        Vec sum[ITEMS][TILES];
        UNROLL
        for (int i = 0; i < ITEMS; ++i) {
            UNROLL
            for (int t = 0; t < TILES; ++t) sum[i][t] = splat(0.0f);
        }
        for (int64_t k = begin; k < K && k < begin + K_BLOCK; ++k) {
            UNROLL
            for (int i = 0; i < ITEMS; ++i) {
                Vec a = splat(xs[i][k]);
                UNROLL
                for (int t = 0; t < TILES; ++t) sum[i][t] = fma(a, load(ws[i] + t * stride + k * LANES), sum[i][t]);
            }
        }
        UNROLL
        for (int i = 0; i < ITEMS; ++i) {
            UNROLL
            for (int t = 0; t < TILES; ++t) {
                float* to = y[i] + column + t * LANES;
                store(to, begin ? load(to) + sum[i][t] : sum[i][t]);
            }
        }
    }
}

// Products with four column tiles whose sums fit into the registers.
constexpr int MOST_WIDE = ACCUMULATORS >= 8 ? 2 : 1;

inline void product_each(int count, const float* const* x, const float* const* w, int64_t stride, int64_t K, int tiles,
                         float* const* y) {
    int column = 0;
    auto columns = [&](auto most, auto width) __attribute__((always_inline)) {
        constexpr int ITEMS = most, TILES = width;
        int i = 0;
        for (; i + ITEMS <= count; i += ITEMS) tile_each<ITEMS, TILES>(x + i, w + i, stride, K, column, y + i);
        for (; i < count; ++i) tile_each<1, TILES>(x + i, w + i, stride, K, column, y + i);
        column += TILES * LANES;
    };
    using std::integral_constant;
    for (; tiles >= 4; tiles -= 4) columns(integral_constant<int, MOST_WIDE>(), integral_constant<int, 4>());
    for (; tiles >= 2; tiles -= 2) columns(integral_constant<int, 4>(), integral_constant<int, 2>());
    if (tiles) columns(integral_constant<int, 8>(), integral_constant<int, 1>());
}

// One query of one head over the keys up to its position: its row (d), room for padded S scores, its output (d).
struct Query {
    const float* q;
    KeyValues kv;
    float scale, *scores, *out;
};

// Calls attend() for each of up to MOST_QUERIES queries at one position. sums: one padded row of d per query.
inline void attend_each(const Query* queries, int count, int64_t position, int d, float* sums) {
    const float *x[MOST_QUERIES], *w[MOST_QUERIES];
    float *y[MOST_QUERIES], total[MOST_QUERIES];
    int64_t keys = position + 1, width = padded(d);
    for (int i = 0; i < count; ++i) x[i] = queries[i].q, w[i] = queries[i].kv.keys, y[i] = queries[i].scores;
    product_each(count, x, w, d * LANES, d, int(padded(keys) / LANES), y);
    for (int i = 0; i < count; ++i) total[i] = softmax(y[i], keys, queries[i].scale);
    for (int i = 0; i < count; ++i) x[i] = y[i], w[i] = queries[i].kv.values, y[i] = sums + i * width;
    product_each(count, x, w, queries[0].kv.S * LANES, keys, int(width / LANES), y);
    for (int i = 0; i < count; ++i) weigh(y[i], total[i], d, queries[i].out);
}

}  // namespace starflow::STARFLOW_ISA
