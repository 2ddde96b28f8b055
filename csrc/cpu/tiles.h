// Products of small matrices that fit into the caches. Each value is summed in ascending order, at most BLOCK terms at
// a time, so its bits do not depend on the shapes of tiles.
#pragma once

#include "attention_sizes.h"
#include "vec.h"

namespace starflow::STARFLOW_ISA {

// Vectors of sums that fit into the registers; a tile has SUMS / TILES rows.
constexpr int SUMS = ACCUMULATORS >= 16 ? 16 : ACCUMULATORS >= 4 ? 4 : 2;
constexpr int COLUMNS = SUMS == 16 ? 4 : SUMS == 4 ? 2 : 1;

// Value (m, k) of the left matrix is at a[m + k BLOCK] if ACROSS, else at a[m BLOCK + k].
template <bool ACROSS, int TILES>
__attribute__((noinline)) void multiply_tile(const float* a, const float* b, int64_t ldb, int64_t K, float* c,
                                             int64_t ldc, bool add) {
    constexpr int ROWS = SUMS / TILES;
    for (int first = 0; first < LANES; first += ROWS) {
        Vec sum[ROWS][TILES];
        UNROLL
        for (int m = 0; m < ROWS; ++m) {
            UNROLL
            for (int t = 0; t < TILES; ++t) sum[m][t] = splat(0.0f);
        }
        const float* from = a + first * (ACROSS ? 1 : BLOCK);
        for (int64_t k = 0; k < K; ++k) {
            Vec column[TILES];
            UNROLL
            for (int t = 0; t < TILES; ++t) column[t] = load(b + k * ldb + t * LANES);
            UNROLL
            for (int m = 0; m < ROWS; ++m) {
                Vec x = splat(from[ACROSS ? m + k * BLOCK : m * BLOCK + k]);
                UNROLL
                for (int t = 0; t < TILES; ++t) sum[m][t] = fma(x, column[t], sum[m][t]);
            }
        }
        UNROLL
        for (int m = 0; m < ROWS; ++m) {
            UNROLL
            for (int t = 0; t < TILES; ++t) {
                float* to = c + (first + m) * ldc + t * LANES;
                store(to, add ? load(to) + sum[m][t] : sum[m][t]);
            }
        }
    }
}

// Computes c (16, 16 tiles) = a (16, K) b (K, 16 tiles), or adds the product to c; K <= BLOCK.
template <bool ACROSS>
void multiply(const float* a, const float* b, int64_t ldb, int64_t K, int64_t tiles, float* c, int64_t ldc, bool add) {
    for (; tiles >= COLUMNS; tiles -= COLUMNS, b += COLUMNS * LANES, c += COLUMNS * LANES)
        multiply_tile<ACROSS, COLUMNS>(a, b, ldb, K, c, ldc, add);
    for (; tiles >= 2 && COLUMNS > 2; tiles -= 2, b += 2 * LANES, c += 2 * LANES)
        multiply_tile < ACROSS, COLUMNS<2 ? 1 : 2>(a, b, ldb, K, c, ldc, add);
    if (tiles > 0 && COLUMNS > 1) multiply_tile<ACROSS, 1>(a, b, ldb, K, c, ldc, add);
}

}  // namespace starflow::STARFLOW_ISA
