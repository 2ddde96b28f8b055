// Products with at most eight outputs, along the channels: product.h would leave lanes empty for so few outputs.
// Weights (outputs, C) are packed as [C / 16][8][16].
#pragma once

#include "lanes.h"

namespace starflow::STARFLOW_ISA {

constexpr int NARROW = 8;
// Rows and outputs per product, whose sums must fit into the registers, and outputs per gradient, whose weights must.
constexpr int PAIR_ROWS = ACCUMULATORS >= 2 * NARROW ? 2 : 1;
constexpr int PAIR_OUTPUTS = ACCUMULATORS >= 2 * NARROW ? NARROW : ACCUMULATORS >= 4 ? 4 : 2;
constexpr int GRADIENT_OUTPUTS = ACCUMULATORS >= 2 * NARROW ? NARROW : 2;

struct Pair {
    float products[2][NARROW], squares[2];
};

// Returns the products of the rows x and x + ldx, and the sums of their squares.
inline Pair narrow_product(const float* x, int64_t ldx, const float* w, int64_t C) {
    Pair pair;
    Vec total[2 * NARROW];
    for (int row = 0; row < 2; row += PAIR_ROWS)
        for (int first = 0; first < NARROW; first += PAIR_OUTPUTS) {
            Vec dots[PAIR_ROWS][PAIR_OUTPUTS], square[PAIR_ROWS];
            UNROLL
            for (int m = 0; m < PAIR_ROWS; ++m) {
                square[m] = splat(0.0f);
                UNROLL
                for (int p = 0; p < PAIR_OUTPUTS; ++p) dots[m][p] = splat(0.0f);
            }
            each(C, [&](int64_t c, int count) __attribute__((always_inline)) {
                Vec value[PAIR_ROWS];
                UNROLL
                for (int m = 0; m < PAIR_ROWS; ++m) {
                    const float* at = x + (row + m) * ldx + c;
                    // Prefetch the next two rows.
                    __builtin_prefetch(at + 2 * ldx);
                    value[m] = load(at, count);
                    square[m] = fma(value[m], value[m], square[m]);
                }
                UNROLL
                for (int p = 0; p < PAIR_OUTPUTS; ++p) {
                    Vec weight = load(w + c * NARROW + (first + p) * LANES);
                    UNROLL
                    for (int m = 0; m < PAIR_ROWS; ++m) dots[m][p] = fma(value[m], weight, dots[m][p]);
                }
            });
            UNROLL
            for (int m = 0; m < PAIR_ROWS; ++m) {
                pair.squares[row + m] = sum(square[m]);
                UNROLL
                for (int p = 0; p < PAIR_OUTPUTS; ++p) total[(row + m) * NARROW + first + p] = dots[m][p];
            }
        }
    store(pair.products[0], sums(total));
    return pair;
}

}  // namespace starflow::STARFLOW_ISA
