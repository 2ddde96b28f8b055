// The affine transform of one token, sixteen dimensions at a time.
#pragma once

#include "elementary.h"
#include "kernels.h"

namespace starflow::STARFLOW_ISA {

// Returns c tanh(r / c). The quotient has the bits of a division.
INLINE Vec soft_clip(Vec r, float clip) {
    if (clip == 0) return r;
    Vec c = splat(clip), inverse = splat(1.0f / clip), size = min(abs(r), splat(TANH_LARGE * clip));
    Vec q = size * inverse;
    return c * copysign(tanh_positive(fma(fma(-q, c, size), inverse, q), q), r);
}

INLINE Vec sigma_of(Vec a, Scale scale) {
    return scale == Scale::exp ? exp(a) : scale == Scale::softplus ? softplus_one(a) : splat(1.0f);
}

// Below this value, softplus equals the exponential in float32.
constexpr float SOFTPLUS_SMALL = -17.0f;

// Returns log sigma, computed from sigma where sigma has full precision.
INLINE Vec log_sigma_of(Vec a, Vec sigma, Scale scale) {
    if (scale == Scale::exp) return a;
    if (scale == Scale::unit) return splat(0.0f);
    return select(a < splat(SOFTPLUS_SMALL), a + splat(SOFTPLUS_SHIFT), log(sigma));
}

struct Gaussian {
    Vec mu, sigma, log_sigma;
};

INLINE Gaussian gaussian_of(Vec mu, Vec a, Scale scale) {
    Vec sigma = sigma_of(a, scale);
    return {mu, sigma, log_sigma_of(a, sigma, scale)};
}

// Sixteen lanes from i on of the raw parameters [a | b] of one token, after the soft clip; a is unused where sigma = 1.
struct Raw {
    Vec a, b;
};

INLINE Raw raw_at(const float* params, int i, int D, const Affine& affine) {
    bool unit = affine.scale == Scale::unit;
    return {unit ? splat(0.0f) : soft_clip(load(params + i, D - i), affine.clip),
            soft_clip(load(params + (unit ? 0 : D) + i, D - i), affine.clip)};
}

// Returns mean and scale under guidance, see affine_flow_inverse/api.py.
INLINE Gaussian guided(Raw with, Raw without, float weight, Rule rule, Scale scale) {
    Vec w = splat(weight);
    if (rule == Rule::tarflow) {
        Vec a = fma(w, with.a - without.a, with.a);
        return gaussian_of(fma(w, with.b - without.b, with.b), a, scale);
    }
    Gaussian g = gaussian_of(with.b, with.a, scale);
    Vec other = sigma_of(without.a, scale);
    if (rule == Rule::itarflow) {
        Vec sigma = fma(w, g.sigma - other, g.sigma);
        return {fma(w, with.b - without.b, with.b), sigma, log(abs(sigma))};
    }
    Vec ratio = min(g.sigma / other, splat(1.0f));
    Vec ws = w * ratio * ratio, precision = splat(1.0f) + w - ws;
    return {((splat(1.0f) + w) * g.mu - ws * without.b) / precision, g.sigma / root(precision),
            g.log_sigma - splat(0.5f) * log(precision)};
}

// Returns sixteen lanes from i on of the mean and scale of one token; `without` is null without guidance.
INLINE Gaussian gaussian_at(const float* params, const float* without, float weight, int i, int D, Rule rule,
                            const Affine& affine) {
    Raw raw = raw_at(params, i, D, affine);
    return without ? guided(raw, raw_at(without, i, D, affine), weight, rule, affine.scale)
                   : gaussian_of(raw.b, raw.a, affine.scale);
}

// Computes x = mu + sigma z and log sigma for one token; x may be z, and log_sigma may be null.
inline void affine_inverse(const float* z, const float* params, const float* without, float weight, int D, Rule rule,
                           const Affine& affine, float* x, float* log_sigma) {
    for (int i = 0; i < D; i += LANES) {
        Gaussian g = gaussian_at(params, without, weight, i, D, rule, affine);
        store(x + i, fma(g.sigma, load(z + i, D - i), g.mu), D - i);
        if (log_sigma) store(log_sigma + i, g.log_sigma, D - i);
    }
}

}  // namespace starflow::STARFLOW_ISA
