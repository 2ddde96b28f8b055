// Functions of one row of values: norms, rotary positions, softmax. Reductions run lane by lane, then by the tree of
// sum(), on every machine.
#pragma once

#include <cmath>

#include "elementary.h"

namespace starflow::STARFLOW_ISA {

constexpr float LAYER_NORM_EPS = 1e-5f, RMS_NORM_EPS = 1e-6f;

INLINE float inverse_root(float x) { return 1.0f / __builtin_sqrtf(x); }

// Applies LayerNorm; y may be x.
inline void layer_norm(const float* x, const float* weight, const float* bias, int n, float* y) {
    Vec total = splat(0.0f);
    for (int i = 0; i < n; i += LANES) total = total + load(x + i, n - i);
    Vec mean = splat(sum(total) / float(n));
    Vec square = splat(0.0f);
    for (int i = 0; i < n; i += LANES) {
        Vec centred = load(x + i, n - i) - mean;
        if (n - i < LANES) centred = select(first(n - i), centred, splat(0.0f));
        square = fma(centred, centred, square);
    }
    Vec scale = splat(inverse_root(sum(square) / float(n) + LAYER_NORM_EPS));
    for (int i = 0; i < n; i += LANES) {
        Vec normal = (load(x + i, n - i) - mean) * scale;
        store(y + i, fma(normal, load(weight + i, n - i), load(bias + i, n - i)), n - i);
    }
}

// Computes four sums side by side, which shortens the chains of dependent additions.
inline float sum_of_squares(const float* x, int n) {
    Vec square[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
    int i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES) {
        UNROLL
        for (int j = 0; j < 4; ++j) {
            Vec value = load(x + i + j * LANES);
            square[j] = fma(value, value, square[j]);
        }
    }
    for (; i < n; i += LANES) {
        Vec value = load(x + i, n - i);
        square[0] = fma(value, value, square[0]);
    }
    return sum((square[0] + square[1]) + (square[2] + square[3]));
}

// Computes y = x rsqrt(mean x^2 + eps) (1 + weight); y may be x.
inline void rms_norm(const float* x, const float* weight, int n, float* y) {
    Vec scale = splat(inverse_root(sum_of_squares(x, n) / float(n) + RMS_NORM_EPS)), one = splat(1.0f);
    int i = 0;
    for (; i + LANES <= n; i += LANES) store(y + i, load(x + i) * scale * (one + load(weight + i)));
    if (i < n) store(y + i, load(x + i, n - i) * scale * (one + load(weight + i, n - i)), n - i);
}

// Rotates the pairs of x (d,) by angles (d / 2,): (x0, x1), (x2, x3), ... or, with `halves`, (x_i, x_{i + d / 2}).
// `sign` -1 rotates back.
inline void rotate(float* x, const float* cos, const float* sin, int d, bool halves, float sign = 1) {
    int step = halves ? 1 : 2, other = halves ? d / 2 : 1;
    for (int i = 0; i < d / 2; ++i) {
        float a = x[i * step], b = x[i * step + other], s = sign * sin[i];
        x[i * step] = a * cos[i] - b * s;
        x[i * step + other] = b * cos[i] + a * s;
    }
}

// Replaces scores (count,) by exp(scale score - max). They are padded to whole vectors with any values, which become
// zeros. Returns the sum and, through `highest`, the maximum.
inline float softmax(float* scores, int64_t count, float scale, float* highest = nullptr) {
    Vec factor = splat(scale), top = splat(-INFINITY), total = splat(0.0f);
    int64_t full = count / LANES * LANES;
    for (int64_t i = 0; i < full; i += LANES) {
        Vec s = load(scores + i) * factor;
        store(scores + i, s);
        top = max(top, s);
    }
    if (full < count) {
        Vec s = select(first(int(count - full)), load(scores + full) * factor, splat(-INFINITY));
        store(scores + full, s);
        top = max(top, s);
    }
    float peak = largest(top);
    for (int64_t i = 0; i < count; i += LANES) {
        Vec p = exp(load(scores + i) - splat(peak));
        store(scores + i, p);
        total = total + p;
    }
    if (highest) *highest = peak;
    return sum(total);
}

}  // namespace starflow::STARFLOW_ISA
