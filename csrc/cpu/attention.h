// Attention over keys and values that are stored as packed weights: keys [S / 16][d][16], values [d / 16][S][16].
// Both products are those of product.h, so a query has the same bits alone and among others.
#pragma once

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
    for (int i = 0; i < d; i += LANES)
        store(to.values + i * to.S + position * LANES, load(value + i, d - i));
}

// n <= MAX_ROWS queries (rows ldq apart) at positions position .. position + n - 1, each over the keys up to its own
// position. scores: n rows of S floats. sums: n rows of d, padded.
inline void attend(const float* q, int64_t ldq, int n, KeyValues kv, int64_t position, int d, float scale,
                   float* scores, float* sums, float* out, int64_t ldo) {
    int64_t keys = position + n, width = padded(d);
    product_tiles(q, ldq, n, kv.keys, d * LANES, d, int(padded(keys) / LANES), scores, kv.S);
    float total[MAX_ROWS];
    for (int i = 0; i < n; ++i) {
        int64_t seen = position + i + 1;
        total[i] = softmax(scores + i * kv.S, seen, scale);
        // Keys of the later queries weigh nothing.
        for (int64_t s = padded(seen); s < keys; ++s) scores[i * kv.S + s] = 0;
    }
    product_tiles(scores, kv.S, n, kv.values, kv.S * LANES, keys, int(width / LANES), sums, width);
    for (int i = 0; i < n; ++i) {
        Vec whole = splat(1.0f / total[i]);
        for (int c = 0; c < d; c += LANES) store(out + i * ldo + c, load(sums + i * width + c) * whole, d - c);
    }
}

}  // namespace starflow::STARFLOW_ISA
