// Copies of rows of one head between the caller's tensors and the kernels.
#pragma once

#include "kernels.h"
#include "rows.h"

namespace starflow::STARFLOW_ISA {

INLINE void copy(const float* x, int d, float* y) {
    for (int c = 0; c < d; c += LANES) store(y + c, load(x + c, d - c), d - c);
}

template <bool HALVES>
INLINE void rotate_pairs(const float* __restrict x, const float* __restrict cos, const float* __restrict sin,
                         float sign, int pairs, float* __restrict y) {
    for (int i = 0; i < pairs; ++i) {
        int first = HALVES ? i : 2 * i, second = HALVES ? i + pairs : 2 * i + 1;
        float a = x[first], b = x[second], s = sign * sin[i];
        y[first] = a * cos[i] - b * s;
        y[second] = b * cos[i] + a * s;
    }
}

// Sets y to x (d,) rotated by the angles of a position; `sign` -1 rotates back.
inline void rotated(const AttentionCall& call, const float* x, int64_t position, float sign, float* y) {
    int pairs = call.d / 2;
    const float *cos = call.cos + position * pairs, *sin = call.sin + position * pairs;
    if (call.rotary == Rotary::none)
        copy(x, call.d, y);
    else if (call.rotary == Rotary::half)
        rotate_pairs<true>(x, cos, sin, sign, pairs, y);
    else
        rotate_pairs<false>(x, cos, sin, sign, pairs, y);
}

}  // namespace starflow::STARFLOW_ISA
