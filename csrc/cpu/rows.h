// Functions of one row of values: norms, rotary positions, softmax. Reductions run lane by lane, then by the tree of
// sum(), on every machine.
#pragma once

#include <cmath>

#include "elementary.h"
#include "lanes.h"

namespace starflow::STARFLOW_ISA {

constexpr float LAYER_NORM_EPS = 1e-5f, RMS_NORM_EPS = 1e-6f;

INLINE float inverse_root(float x) { return 1.0f / __builtin_sqrtf(x); }

// Returns sums over every sixteenth of n values.
INLINE Vec partial_sums(const float* x, int n) {
    Vec total = splat(0.0f);
    for (int i = 0; i < n; i += LANES) total = total + load(x + i, n - i);
    return total;
}

// Does the same for the squares of x - mean.
INLINE Vec partial_squares(const float* x, float mean, int n) {
    Vec square = splat(0.0f);
    for (int i = 0; i < n; i += LANES) {
        Vec centred = load(x + i, n - i) - splat(mean);
        if (n - i < LANES) centred = select(first(n - i), centred, splat(0.0f));
        square = fma(centred, centred, square);
    }
    return square;
}

// Computes y = (x - mean) scale weight + bias.
INLINE void standardize(const float* x, float mean, float scale, const float* weight, const float* bias, int n,
                        float* y) {
    for (int i = 0; i < n; i += LANES) {
        Vec normal = (load(x + i, n - i) - splat(mean)) * splat(scale);
        store(y + i, fma(normal, load(weight + i, n - i), load(bias + i, n - i)), n - i);
    }
}

// Applies LayerNorm; y may be x.
inline void layer_norm(const float* x, const float* weight, const float* bias, int n, float* y) {
    float mean = sum(partial_sums(x, n)) / float(n);
    float scale = inverse_root(sum(partial_squares(x, mean, n)) / float(n) + LAYER_NORM_EPS);
    standardize(x, mean, scale, weight, bias, n, y);
}

// Mean, or 0, of sixteen rows, and 1 / size, the root of their mean square around it.
struct Statistics {
    float mean[LANES], scale[LANES];
};

// Returns those of the first `rows` rows, `stride` apart; the steps from partial sums to sums are shared. centred: whether
// to compute the means.
INLINE Statistics statistics(const float* x, int rows, int64_t stride, int n, bool centred, float eps) {
    Statistics of{};
    Vec part[LANES], count = splat(float(n));
    if (centred) {
        for (int r = 0; r < LANES; ++r) part[r] = r < rows ? partial_sums(x + r * stride, n) : splat(0.0f);
        store(of.mean, sums(part) / count);
    }
    for (int r = 0; r < LANES; ++r) part[r] = r < rows ? partial_squares(x + r * stride, of.mean[r], n) : splat(0.0f);
    store(of.scale, splat(1.0f) / root(sums(part) / count + splat(eps)));
    return of;
}

// Does the same as layer_norm for rows `stride` apart.
inline void layer_norm_rows(const float* x, int64_t rows, int64_t stride, const float* weight, const float* bias, int n,
                            float* y) {
    for (; rows >= LANES; rows -= LANES, x += LANES * stride, y += LANES * stride) {
        Statistics of = statistics(x, LANES, stride, n, true, LAYER_NORM_EPS);
        for (int r = 0; r < LANES; ++r)
            standardize(x + r * stride, of.mean[r], of.scale[r], weight, bias, n, y + r * stride);
    }
    for (; rows; --rows, x += stride, y += stride) layer_norm(x, weight, bias, n, y);
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
