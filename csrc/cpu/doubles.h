// Vectors of eight double lanes with the operations of vec.h and elementary.h, so that a kernel can be written once for
// both types. exp, log and functions made of them are within a few ulp of the exact value, relative to 1 where a result
// near 0 is a difference.
#pragma once

#include "elementary.h"

namespace starflow::STARFLOW_ISA {

constexpr int DOUBLE_LANES = LANES / 2;

typedef double DoublePart __attribute__((vector_size(PART * 4)));
typedef double LooseDoublePart __attribute__((vector_size(PART * 4), aligned(8)));
typedef int64_t LongPart __attribute__((vector_size(PART * 4)));

struct Doubles {
    DoublePart part[PARTS];
};

// Masks (0 or -1 per lane).
struct Longs {
    LongPart part[PARTS];
};

INLINE Doubles splat(double x) { LANEWISE(Doubles, x - DoublePart{}); }
INLINE Doubles operator+(Doubles a, Doubles b) { LANEWISE(Doubles, a.part[i] + b.part[i]); }
INLINE Doubles operator-(Doubles a, Doubles b) { LANEWISE(Doubles, a.part[i] - b.part[i]); }
INLINE Doubles operator*(Doubles a, Doubles b) { LANEWISE(Doubles, a.part[i] * b.part[i]); }
INLINE Doubles operator/(Doubles a, Doubles b) { LANEWISE(Doubles, a.part[i] / b.part[i]); }
INLINE Doubles operator-(Doubles a) { LANEWISE(Doubles, -a.part[i]); }
INLINE Longs operator<(Doubles a, Doubles b) { LANEWISE(Longs, a.part[i] < b.part[i]); }
INLINE Longs operator>(Doubles a, Doubles b) { LANEWISE(Longs, a.part[i] > b.part[i]); }
INLINE Longs operator&(Longs a, Longs b) { LANEWISE(Longs, a.part[i] & b.part[i]); }
INLINE Doubles select(Longs mask, Doubles yes, Doubles no) {
    LANEWISE(Doubles, mask.part[i] ? yes.part[i] : no.part[i]);
}
// NaN in the first argument stays NaN.
INLINE Doubles max(Doubles a, Doubles b) { LANEWISE(Doubles, a.part[i] < b.part[i] ? b.part[i] : a.part[i]); }
INLINE Doubles min(Doubles a, Doubles b) { LANEWISE(Doubles, a.part[i] > b.part[i] ? b.part[i] : a.part[i]); }
INLINE Doubles abs(Doubles a) { LANEWISE(Doubles, (DoublePart)((LongPart)a.part[i] & INT64_MAX)); }

INLINE DoublePart fma_part(DoublePart a, DoublePart b, DoublePart c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_pd(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_pd(a, b, c);
#elif defined(__aarch64__)
    return vfmaq_f64(c, a, b);
#else
    return a * b + c;
#endif
}

INLINE Doubles fma(Doubles a, Doubles b, Doubles c) { LANEWISE(Doubles, fma_part(a.part[i], b.part[i], c.part[i])); }

INLINE DoublePart root_part(DoublePart a) {
#if defined(__AVX512F__)
    return _mm512_sqrt_pd(a);
#elif defined(__AVX2__)
    return _mm256_sqrt_pd(a);
#elif defined(__aarch64__)
    return vsqrtq_f64(a);
#else
    for (int i = 0; i < PART / 2; ++i) a[i] = __builtin_sqrt(a[i]);
    return a;
#endif
}

INLINE Doubles root(Doubles a) { LANEWISE(Doubles, root_part(a.part[i])); }

INLINE Doubles load(const double* p) { LANEWISE(Doubles, reinterpret_cast<const LooseDoublePart*>(p)[i]); }
INLINE void store(double* p, Doubles a) {
    for (int i = 0; i < PARTS; ++i) reinterpret_cast<LooseDoublePart*>(p)[i] = a.part[i];
}

// Adding ROUND rounds to an integer, which the low bits of the sum then hold.
constexpr double ROUND = 6755399441055744.0;  // 1.5 2^52
constexpr double LN2_HIGH = 0x1.62e42fefap-1, LN2_LOW = 0x1.cf79abc9e3b3ap-40;

INLINE DoublePart power_of_two(LongPart n) { return (DoublePart)((n + 1023) << 52); }

INLINE DoublePart exp_scale(DoublePart y, DoublePart shifted) {
    // Two factors: 2^n alone would leave the range of doubles at both ends.
    LongPart n = (LongPart)shifted - (LongPart)(ROUND - DoublePart{}), half = n >> 1;
    return y * power_of_two(half) * power_of_two(n - half);
}

// Returns e^x: 0 below -746, infinity above 710, NaN for NaN.
INLINE Doubles exp(Doubles x) {
    x = min(max(x, splat(-746.0)), splat(710.0));
    Doubles shifted = fma(x, splat(1.4426950408889634), splat(ROUND)), n = shifted - splat(ROUND);
    Doubles r = fma(n, splat(-LN2_LOW), fma(n, splat(-LN2_HIGH), x)), y = splat(1.0 / 6227020800);
    // The Taylor series, whose next term is below 2^-60 for |r| <= log(2) / 2.
    static const double c[] = {
        1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720,
        1.0 / 120,       1.0 / 24,       1.0 / 6,       0.5,          1.0,         1.0};
    for (double term : c) y = fma(y, r, splat(term));
    LANEWISE(Doubles, exp_scale(y.part[i], shifted.part[i]));
}

// Returns log x for x > 0 that is normal, and NaN for NaN.
INLINE Doubles log(Doubles x) {
    const LongPart middle = 0x3fe6a09e667f3bcd - LongPart{};  // of sqrt(1/2)
    Doubles n, f;
    for (int i = 0; i < PARTS; ++i) {
        LongPart bits = (LongPart)x.part[i], exponent = (bits - middle) & ~INT64_C(0xfffffffffffff);
        f.part[i] = (DoublePart)(bits - exponent) - 1.0;
        n.part[i] = (DoublePart)((exponent >> 52) + (LongPart)(ROUND - DoublePart{})) - ROUND;
    }
    // log(1 + f) = 2 artanh(s) with |s| < 0.172.
    Doubles s = f / (f + splat(2.0)), square = s * s, y = splat(2.0 / 23);
    for (int k = 21; k > 1; k -= 2) y = fma(y, square, splat(2.0 / k));
    Doubles series = fma(s * square, y, fma(n, splat(LN2_LOW), s + s));
    Doubles sum = fma(n, splat(LN2_HIGH), series);
    LANEWISE(Doubles, x.part[i] == x.part[i] ? sum.part[i] : x.part[i]);
}

// Returns log(1 + u) for u >= 0; the last term restores what the rounded sum 1 + u lost.
INLINE Doubles log1p(Doubles u) {
    Doubles w = splat(1.0) + u;
    return log(w) - ((w - splat(1.0)) - u) / w;
}

INLINE Doubles tanh(Doubles x) { return splat(1.0) - splat(2.0) / (exp(x + x) + splat(1.0)); }
INLINE Doubles silu(Doubles x) { return x / (splat(1.0) + exp(-x)); }

INLINE Doubles gelu(Doubles x) {
    double lanes[DOUBLE_LANES];
    store(lanes, x);
    for (double& lane : lanes) lane = 0.5 * lane * (1 + __builtin_erf(lane * 0.70710678118654752));
    return load(lanes);
}

INLINE Doubles gelu_tanh(Doubles x) {
    Doubles inner = splat(0.79788456080286536) * fma(x * x * x, splat(0.044715), x);
    return splat(0.5) * x * (splat(1.0) + tanh(inner));
}

}  // namespace starflow::STARFLOW_ISA
