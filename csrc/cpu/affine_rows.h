// The affine transform in the density direction, on rows of n values in cache. Each step is a short loop, because a
// long chain of dependent operations would stall. Rows other than inputs have room for n values and 4 more vectors.
#pragma once

#include "affine.h"
#include "formats.h"

namespace starflow::STARFLOW_ISA {

constexpr int64_t ROOM = 4 * LANES;

// Hooks that the loops over n values call once per vector, to prefetch memory that is needed next. params(i) covers 2n
// parameters (n where sigma = 1), rows(i) covers n values. This version does nothing.
struct NothingAhead {
    INLINE void params(int64_t) const {}
    INLINE void rows(int64_t) const {}
};

inline void clip_row(float* r, int64_t n, float clip, auto early) {
    if (clip == 0) return;
    for (int64_t i = 0; i < n; i += LANES) {
        early(i);
        store(r + i, soft_clip(load(r + i), clip));
    }
}

// Computes the first of the two steps of softplus_one.
inline void softplus_powers(const float* a, int64_t n, float* v, auto early) {
    for (int64_t i = 0; i < n; i += LANES) {
        early(i);
        store(v + i, softplus_power(load(a + i)));
    }
}

// A sum over many vectors, with compensation of the rounding errors (Kahan).
struct LongSum {
    Vec sum = splat(0.0f), lost = splat(0.0f);

    INLINE void add(Vec value) {
        Vec whole = value - lost, next = sum + whole;
        lost = (next - sum) - whole;
        sum = next;
    }
    double total() const {
        float lanes[2][LANES];
        double all = 0;
        store(lanes[0], sum);
        store(lanes[1], lost);
        for (int i = 0; i < LANES; ++i) all += double(lanes[0][i]) - double(lanes[1][i]);
        return all;
    }
};

// Returns the sum of log sigma over n values. Where sigma is bounded, one logarithm serves the product of four vectors.
inline double log_sigma_sum(const float* a, float* sigma, int64_t n, float clip) {
    LongSum total;
    if (clip > 0 && clip <= 16) {
        for (int64_t i = n; i % ROOM; ++i) sigma[i] = 1;
        for (int64_t i = 0; i < n; i += ROOM) {
            Vec left = load(sigma + i) * load(sigma + i + LANES);
            total.add(log(left * (load(sigma + i + 2 * LANES) * load(sigma + i + 3 * LANES))));
        }
        return total.total();
    }
    each(n, [&](int64_t i, int count) __attribute__((always_inline)) {
        Vec l = log_sigma_of(load(a + i), load(sigma + i), Scale::softplus);
        total.add(count < LANES ? select(first(count), l, splat(0.0f)) : l);
    });
    return total.total();
}

// Computes z = (x - mu) / sigma. a and b hold raw parameters, with zeros past the end, and are overwritten. Returns the
// sum of log sigma, or writes -log sigma to `logdets` if that is not null. z may be x.
inline double density_rows(float* a, float* b, float* sigma, const float* x, int64_t n, const Affine& affine, float* z,
                           float* logdets, auto ahead) {
    auto of_b = [&](int64_t i) __attribute__((always_inline)) { ahead.params(i); };
    auto of_a = [&](int64_t i) __attribute__((always_inline)) { ahead.params(n + i); };
    auto unclipped = [&](int64_t i) __attribute__((always_inline)) {
        if (affine.clip > 0) return;
        of_b(i);
        if (affine.scale != Scale::unit) of_a(i);
    };
    clip_row(b, n, affine.clip, of_b);
    if (affine.scale == Scale::unit) {
        each(n, [&](int64_t i, int count) __attribute__((always_inline)) {
            unclipped(i);
            ahead.rows(i);
            store(z + i, load(x + i, count) - load(b + i), count);
            if (logdets) store(logdets + i, splat(0.0f), count);
        });
        return 0;
    }
    clip_row(a, n, affine.clip, of_a);
    if (affine.scale == Scale::exp) {
        LongSum total;
        each(n, [&](int64_t i, int count) __attribute__((always_inline)) {
            unclipped(i);
            ahead.rows(i);
            Vec l = load(a + i);
            store(z + i, (load(x + i, count) - load(b + i)) * exp(-l), count);
            if (logdets) store(logdets + i, splat(0.0f) - l, count);
            total.add(l);
        });
        return total.total();
    }
    softplus_powers(a, n, sigma, unclipped);
    each(n, [&](int64_t i, int count) __attribute__((always_inline)) {
        ahead.rows(i);
        Vec s = softplus_of(load(a + i), load(sigma + i));
        store(sigma + i, s);
        store(z + i, (load(x + i, count) - load(b + i)) / s, count);
    });
    if (!logdets) return log_sigma_sum(a, sigma, n, affine.clip);
    each(n, [&](int64_t i, int count) __attribute__((always_inline)) {
        store(logdets + i, splat(0.0f) - log_sigma_of(load(a + i), load(sigma + i), Scale::softplus), count);
    });
    return 0;
}

// Computes the gradients with respect to x and the raw parameters. a and b are as in density_rows, and are overwritten
// by their gradients. grad_l needs the same extra room. grad_x may be grad_z.
inline void density_gradient_rows(float* a, float* b, float* v, const float* grad_z, const float* z,
                                  const float* grad_l, int64_t n, const Affine& affine, float* grad_x, auto ahead) {
    Vec one = splat(1.0f), inverse = splat(affine.clip > 0 ? 1.0f / affine.clip : 0.0f);
    auto through_clip = [&](Vec clipped) __attribute__((always_inline)) {
        Vec tanh = clipped * inverse;
        return fma(-tanh, tanh, one);
    };
    auto of_b = [&](int64_t i) __attribute__((always_inline)) { ahead.params(i); };
    auto of_a = [&](int64_t i) __attribute__((always_inline)) { ahead.params(n + i); };
    auto unclipped = [&](int64_t i) __attribute__((always_inline)) {
        if (affine.clip > 0) return;
        of_b(i);
        if (affine.scale != Scale::unit) of_a(i);
    };
    clip_row(b, n, affine.clip, of_b);
    if (affine.scale == Scale::unit) {
        each(n, [&](int64_t i, int count) __attribute__((always_inline)) {
            unclipped(i);
            ahead.rows(i);
            Vec g = load(grad_z + i, count);
            store(grad_x + i, g, count);
            store(b + i, -g * through_clip(load(b + i)));
        });
        return;
    }
    clip_row(a, n, affine.clip, of_a);
    bool softplus = affine.scale == Scale::softplus;
    if (softplus) softplus_powers(a, n, v, unclipped);
    each(n, [&](int64_t i, int count) __attribute__((always_inline)) {
        if (!softplus) unclipped(i);
        ahead.rows(i);
        Vec raw = load(a + i), g = load(grad_z + i, count), slope = one, grad;
        // Where the gradient of z is zero, z contributes nothing, even if z or 1 / sigma is infinite.
        Int used = abs(g) > splat(0.0f);
        if (softplus) {
            Vec u = load(v + i), sigma = softplus_of(raw, u), inverse_both = one / ((one + u) * sigma);
            slope = select(raw < splat(SOFTPLUS_SMALL), one, u * inverse_both);
            grad = g * ((one + u) * inverse_both);
        } else {
            grad = g * exp(-raw);
        }
        grad = select(used, grad, g);
        Vec noise = select(used, load(z + i, count), splat(0.0f));
        store(a + i, -fma(g, noise, load(grad_l + i)) * slope * through_clip(raw));
        store(b + i, -grad * through_clip(load(b + i)));
        store(grad_x + i, grad, count);
    });
}

}  // namespace starflow::STARFLOW_ISA
