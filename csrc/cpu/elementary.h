// exp, log, tanh and functions made of them, sixteen lanes at a time, within 2.6 ulp of the exact value (GELU: of x).
// Polynomials and rational functions are minimax fits on the ranges that the comments name.
#pragma once

#include "vec.h"

namespace starflow::STARFLOW_ISA {

template <int N>
INLINE Vec polynomial(Vec x, const float (&c)[N]) {
    Vec y = splat(c[N - 1]);
    for (int i = N - 2; i >= 0; --i) y = fma(y, x, splat(c[i]));
    return y;
}

constexpr float LOG2_HIGH = 0.693145752f, LOG2_LOW = 1.42860677e-6f;  // n LOG2_HIGH is exact for |n| < 2^11

// x = n log 2 + r with |r| <= log(2) / 2 for |x| < 2^21; n in the low bits of `shifted`, and as a float.
struct Reduced {
    Vec shifted, n, r;
};

INLINE Vec remainder(Vec x, Vec n) { return fma(n, splat(-LOG2_LOW), fma(n, splat(-LOG2_HIGH), x)); }

INLINE Reduced reduced(Vec x) {
    // Adding 1.5 2^23 rounds to an integer, which the low bits of the sum then hold.
    Vec shifted = fma(x, splat(1.44269504f), splat(12582912.0f)), n = shifted - splat(12582912.0f);
    return {shifted, n, remainder(x, n)};
}

// Returns e^r - 1 for |r| <= log(2) / 2. The polynomial has two independent halves: dependent steps cost most.
INLINE Vec expm1_reduced(Vec r) {
    static const float low[] = {0.5f, 0.166665062f}, high[] = {0.0416661687f, 0.00837032124f, 0.001395297f};
    Vec square = r * r;
    return fma(square, fma(square, polynomial(r, high), polynomial(r, low)), r);
}

INLINE Part scale_part(Part y, Part n, IntPart shifted) {
#if defined(__AVX512F__)
    return _mm512_scalef_ps(y, n);
#else
    // Multiply by two factors: 2^n alone would leave the range of floats at both ends.
    IntPart whole = shifted - 0x4b400000, half = whole >> 1;
    return y * (Part)((half + 127) << 23) * (Part)((whole - half + 127) << 23);
#endif
}

INLINE Vec scaled(Vec y, Reduced by) {
    LANEWISE(Vec, scale_part(y.part[i], by.n.part[i], (IntPart)by.shifted.part[i]));
}

// Clamps x to the range where exp is neither 0 nor infinity; NaN stays NaN.
INLINE Vec within_exp(Vec x) { return min(max(x, splat(-104.0f)), splat(89.0f)); }

// Returns e^x: 0 below -104, infinity above 88.73, NaN for NaN.
INLINE Vec exp(Vec x) {
    Reduced to = reduced(within_exp(x));
    return scaled(expm1_reduced(to.r) + splat(1.0f), to);
}

// Returns n log 2 + log(1 + f) for f in [sqrt(1/2) - 1, sqrt(2) - 1]; n is given as bits(2^n) - bits(1).
INLINE Vec log_reduced(Int n, Vec f) {
    static const float low[] = {0.333333105f, -0.249999866f, 0.200022265f},
                       middle[] = {-0.16669251f, 0.142186582f, -0.123843484f},
                       high[] = {0.118729763f, -0.117898077f, 0.0691536814f};
    Vec whole = bits((n >> 23) + splat(0x4b400000)) - splat(12582912.0f);
    Vec square = f * f, cube = square * f;
    Vec series = fma(cube, fma(cube, polynomial(f, high), polynomial(f, middle)), polynomial(f, low));
    Vec y = fma(cube, series, whole * splat(LOG2_LOW));
    y = fma(square, splat(-0.5f), y);
    return fma(whole, splat(LOG2_HIGH), f + y);
}

// Returns bits(2^n) - bits(1) for the n with x 2^-n in [sqrt(1/2), sqrt(2)).
INLINE Int exponent(Vec x) { return (bits(x) - splat(0x3f3504f3)) & splat(int32_t(0xff800000)); }

// Returns log x for x > 0 that is normal or infinite, and NaN for NaN.
INLINE Vec log(Vec x) {
    Int n = exponent(x);
    return select(x < splat(3.4e38f), log_reduced(n, bits(bits(x) - n) - splat(1.0f)), x);
}

// Returns log(1 + u) for 0 <= u < 2^126 without losing digits of u: the rounded sum 1 + u only determines n.
INLINE Vec log1p(Vec u) {
    Int n = exponent(splat(1.0f) + u);
    Vec scale = bits(splat(0x3f800000) - n);
    return log_reduced(n, fma(u, scale, scale - splat(1.0f)));
}

INLINE Vec copysign(Vec x, Vec sign) { return bits((bits(x) & splat(INT32_MAX)) | (bits(sign) & splat(INT32_MIN))); }

// Returns tanh t = E / (E + 2) for 0 <= t <= 10, with E = e^2t - 1 = 2^n (e^r - 1) + (2^n - 1), accurate near 0.
// `near` is t up to rounding, which the caller may know earlier.
INLINE Vec tanh_positive(Vec t, Vec near) {
    auto [shifted, n, _] = reduced(near + near);
    Vec r = remainder(t + t, n), scale = bits((bits(shifted) << 23) + splat(0x3f800000));
    Vec e = fma(scale, expm1_reduced(r), scale - splat(1.0f));
    return e / (e + splat(2.0f));
}

constexpr float TANH_LARGE = 10.0f;  // from here on tanh rounds to 1

INLINE Vec tanh(Vec x) {
    Vec t = min(abs(x), splat(TANH_LARGE));
    return copysign(tanh_positive(t, t), x);
}

// Returns erf(x / sqrt 2) / 2: a rational function of x^2 times x, and 1/2 from 5.6 on.
INLINE Vec half_erf(Vec x) {
    static const float above[] = {0.398942262f,    0.0339286886f,   0.00467731059f,
                                  0.000168922867f, 6.28948101e-06f, 2.22961773e-08f};
    static const float below[] = {1.0f, 0.251712948f, 0.0286773127f, 0.00188545824f, 7.33407796e-05f, 1.17959837e-06f};
    Vec square = x * x, half = x * polynomial(square, above) / polynomial(square, below);
    return select(abs(x) > splat(5.6f), copysign(splat(0.5f), x), half);
}

// Returns x (1 + erf(x / sqrt 2)) / 2.
INLINE Vec gelu(Vec x) { return x * (splat(0.5f) + half_erf(x)); }

INLINE Vec gelu_gradient(Vec x) {
    return fma(x * splat(0.398942280f), exp(splat(-0.5f) * x * x), splat(0.5f) + half_erf(x));
}

INLINE Vec sigmoid(Vec x) { return splat(1.0f) / (splat(1.0f) + exp(-x)); }

INLINE Vec silu(Vec x) { return x / (splat(1.0f) + exp(-x)); }

// Returns GELU in the tanh approximation, with argument sqrt(2 / pi) (x + 0.044715 x^3).
INLINE Vec gelu_tanh(Vec x) {
    Vec inner = splat(0.797884561f) * fma(x * x * x, splat(0.044715f), x);
    return splat(0.5f) * x * (splat(1.0f) + tanh(inner));
}

INLINE Vec gelu_tanh_gradient(Vec x) {
    Vec one = splat(1.0f), inner = splat(0.797884561f) * fma(x * x * x, splat(0.044715f), x), t = tanh(inner);
    Vec slope = splat(0.797884561f) * fma(x * x, splat(3 * 0.044715f), one);
    return splat(0.5f) * fma(x * slope, fma(-t, t, one), one + t);
}

// softplus(a + c) with c such that softplus(c) = 1, which is log(1 + v) with v = (e - 1) e^a.
constexpr float SOFTPLUS_LARGE = 80.0f, SOFTPLUS_SHIFT = 0.541324855f;

// Returns v, capped from SOFTPLUS_LARGE on. e - 1 is split into two constants, because sums over many values would show
// the bias of one.
INLINE Vec softplus_power(Vec a) {
    Vec e_less_one = splat(1.71828187f);
    Reduced to = reduced(within_exp(min(a, splat(SOFTPLUS_LARGE))));
    return scaled(fma(expm1_reduced(to.r) - splat(2.13357839e-8f), e_less_one, e_less_one), to);
}

INLINE Vec softplus_of(Vec a, Vec v) { return select(a > splat(SOFTPLUS_LARGE), a + splat(SOFTPLUS_SHIFT), log1p(v)); }

INLINE Vec softplus_one(Vec a) { return softplus_of(a, softplus_power(a)); }

}  // namespace starflow::STARFLOW_ISA
