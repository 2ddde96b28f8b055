// exp, log, tanh and what is made of them, sixteen lanes at a time, within 2.5 ulp of the exact value (GELU: of x).
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

// 2^n as a float for -126 <= n <= 127.
INLINE Vec power_of_two(Int n) { return bits((n + splat(127)) << 23); }

// e^x: 0 below -104, infinity above 88.73, NaN for NaN.
INLINE Vec exp(Vec x) {
    static const float q[] = {0.5f, 0.166665062f, 0.0416661687f, 0.00837032124f, 0.001395297f};
    x = select(x < splat(-104.0f), splat(-104.0f), select(x > splat(89.0f), splat(89.0f), x));
    // Adding 1.5 2^23 rounds to an integer, which the low bits of the sum then hold.
    Vec shifted = fma(x, splat(1.44269504f), splat(12582912.0f));
    Int n = bits(shifted) - splat(0x4b400000);
    Vec whole = shifted - splat(12582912.0f);
    Vec r = fma(whole, splat(-1.42860677e-6f), fma(whole, splat(-0.693145752f), x));
    Vec y = fma(r * r, polynomial(r, q), r) + splat(1.0f);
    // Two factors: 2^n alone would leave the range of floats at both ends.
    Int half = n >> 1;
    return y * power_of_two(half) * power_of_two(n - half);
}

// log(m 2^n) = log1p(f) + n log 2 with m in [sqrt(1/2), sqrt(2)), f = m - 1; x > 0 and normal or infinite.
INLINE Vec log(Vec x) {
    static const float p[] = {0.333333105f,  -0.249999866f, 0.200022265f,  -0.16669251f, 0.142186582f,
                              -0.123843484f, 0.118729763f,  -0.117898077f, 0.0691536814f};
    Int n = (bits(x) - splat(0x3f3504f3)) >> 23;
    Vec f = bits(bits(x) - (n << 23)) - splat(1.0f);
    Vec whole = bits(n + splat(0x4b400000)) - splat(12582912.0f);
    Vec square = f * f;
    Vec y = fma(square * f, polynomial(f, p), whole * splat(1.42860677e-6f));
    y = fma(square, splat(-0.5f), y);
    y = fma(whole, splat(0.693145752f), f + y);
    return select(x > splat(3.4e38f), x, y);
}

// log(1 + u) for 0 <= u <= 1, accurate to u: what 1 + u rounds away is put back.
INLINE Vec log1p(Vec u) {
    Vec w = splat(1.0f) + u;
    return log(w) + (u - (w - splat(1.0f))) / w;
}

INLINE Vec copysign(Vec x, Vec sign) {
    return bits((bits(x) & splat(INT32_MAX)) | (bits(sign) & splat(INT32_MIN)));
}

INLINE Vec tanh(Vec x) {
    static const float small[] = {-0.333332777f, 0.133313283f, -0.0537292287f, 0.020601999f, -0.00566078071f};
    Vec t = abs(x), square = x * x;
    Vec inner = fma(x * square, polynomial(square, small), x);
    Vec outer = splat(1.0f) - splat(2.0f) / (exp(t + t) + splat(1.0f));
    return select(t > splat(0.625f), copysign(outer, x), inner);
}

// x (1 + erf(x / sqrt 2)) / 2; erf(x / sqrt 2) / 2 is a rational function of x^2 times x, and 1/2 from 5.6 on.
INLINE Vec gelu(Vec x) {
    static const float above[] = {0.398942262f,    0.0339286886f,   0.00467731059f,
                                  0.000168922867f, 6.28948101e-06f, 2.22961773e-08f};
    static const float below[] = {1.0f,           0.251712948f,    0.0286773127f,
                                  0.00188545824f, 7.33407796e-05f, 1.17959837e-06f};
    Vec square = x * x, half = x * polynomial(square, above) / polynomial(square, below);
    half = select(abs(x) > splat(5.6f), copysign(splat(0.5f), x), half);
    return x * (splat(0.5f) + half);
}

// The tanh form, sqrt(2 / pi) (x + 0.044715 x^3).
INLINE Vec gelu_tanh(Vec x) {
    Vec inner = splat(0.797884561f) * fma(x * x * x, splat(0.044715f), x);
    return splat(0.5f) * x * (splat(1.0f) + tanh(inner));
}

// softplus(a + c) with c such that softplus(c) = 1, which is log(1 + (e - 1) e^a).
INLINE Vec softplus_one(Vec a) {
    Int negative = a < splat(0.0f);
    Vec u = exp(-abs(a)), v = splat(1.71828183f) * u;
    Vec w = select(negative, splat(1.0f) + v, splat(1.71828183f) + u);
    return log(w) + select(negative, (v - (w - splat(1.0f))) / w, a);
}

}  // namespace starflow::STARFLOW_ISA
