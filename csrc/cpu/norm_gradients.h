// Gradients of the norms of rows.h with respect to their input.
#pragma once

#include "rows.h"

namespace starflow::STARFLOW_ISA {

// Calls each(i, count) for the vectors of n values; count is the number of lanes in use.
template <class Each>
INLINE void vectors(int n, Each each) {
    for (int i = 0; i < n; i += LANES) each(i, n - i < LANES ? n - i : LANES);
}

INLINE Vec used(Vec x, int count) { return count < LANES ? select(first(count), x, splat(0.0f)) : x; }

// Adds the gradient of layer_norm to `to`, from that of its output. weight is padded.
inline void layer_norm_gradient(const float* x, const float* weight, const float* grad, int n, float* to) {
    Vec total = splat(0.0f), square = total, plain = total, inner = total;
    vectors(n, [&](int i, int count) __attribute__((always_inline)) { total = total + load(x + i, count); });
    Vec mean = splat(sum(total) / float(n));
    vectors(n, [&](int i, int count) __attribute__((always_inline)) {
        Vec centred = used(load(x + i, count) - mean, count), g = load(grad + i, count) * load(weight + i);
        square = fma(centred, centred, square);
        plain = plain + g;
        inner = fma(centred, g, inner);
    });
    float scale = inverse_root(sum(square) / float(n) + LAYER_NORM_EPS);
    Vec along = splat(scale * scale * sum(inner) / float(n)), constant = splat(sum(plain) / float(n));
    vectors(n, [&](int i, int count) __attribute__((always_inline)) {
        Vec g = load(grad + i, count) * load(weight + i) - constant;
        store(to + i, fma(splat(scale), fma(mean - load(x + i, count), along, g), load(to + i, count)), count);
    });
}

// Sets `to` to the gradient of rms_norm, from that of its output, or adds it. `to` may be grad.
inline void rms_norm_gradient(const float* x, const float* weight, const float* grad, int n, float* to, bool add) {
    Vec one = splat(1.0f), inner = splat(0.0f);
    float scale = inverse_root(sum_of_squares(x, n) / float(n) + RMS_NORM_EPS);
    vectors(n, [&](int i, int count) __attribute__((always_inline)) {
        inner = fma(load(x + i, count) * load(grad + i, count), one + load(weight + i, count), inner);
    });
    Vec along = splat(scale * scale * sum(inner) / float(n));
    vectors(n, [&](int i, int count) __attribute__((always_inline)) {
        Vec g = load(grad + i, count) * (one + load(weight + i, count));
        Vec whole = splat(scale) * fma(-load(x + i, count), along, g);
        store(to + i, add ? load(to + i, count) + whole : whole, count);
    });
}

}  // namespace starflow::STARFLOW_ISA
