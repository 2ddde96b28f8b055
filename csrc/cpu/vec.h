// Vectors of sixteen float lanes on every machine. Operations and their order do not depend on the register width, so
// results do not either. Where the machine has fused multiply-add, fma() is fused.
// This file is compiled once per instruction set, each time in its own namespace; see setup.py.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// Loops over registers must be unrolled, or the compiler puts the registers into memory.
#define UNROLL _Pragma("GCC unroll 16")
#define INLINE inline __attribute__((always_inline))

namespace starflow::STARFLOW_ISA {

constexpr int LANES = 16;
#if defined(__AVX512F__)
constexpr int PART = 16, ACCUMULATORS = 24;
#elif defined(__AVX2__)
constexpr int PART = 8, ACCUMULATORS = 6;
#elif defined(__aarch64__)
constexpr int PART = 4, ACCUMULATORS = 6;
#else
constexpr int PART = 4, ACCUMULATORS = 3;
#endif
constexpr int PARTS = LANES / PART;

typedef float Part __attribute__((vector_size(PART * 4)));
typedef float LoosePart __attribute__((vector_size(PART * 4), aligned(4)));
typedef int32_t IntPart __attribute__((vector_size(PART * 4)));

struct Vec {
    Part part[PARTS];
};

// Integers, and the masks (0 or -1 per lane) that comparisons give.
struct Int {
    IntPart part[PARTS];
};

#define LANEWISE(result, expression)                            \
    result out;                                                 \
    for (int i = 0; i < PARTS; ++i) out.part[i] = (expression); \
    return out

INLINE Vec splat(float x) { LANEWISE(Vec, x - Part{}); }
INLINE Int splat(int32_t x) { LANEWISE(Int, x - IntPart{}); }

INLINE Vec operator+(Vec a, Vec b) { LANEWISE(Vec, a.part[i] + b.part[i]); }
INLINE Vec operator-(Vec a, Vec b) { LANEWISE(Vec, a.part[i] - b.part[i]); }
INLINE Vec operator*(Vec a, Vec b) { LANEWISE(Vec, a.part[i] * b.part[i]); }
INLINE Vec operator/(Vec a, Vec b) { LANEWISE(Vec, a.part[i] / b.part[i]); }
INLINE Vec operator-(Vec a) { LANEWISE(Vec, -a.part[i]); }
INLINE Int operator+(Int a, Int b) { LANEWISE(Int, a.part[i] + b.part[i]); }
INLINE Int operator-(Int a, Int b) { LANEWISE(Int, a.part[i] - b.part[i]); }
INLINE Int operator&(Int a, Int b) { LANEWISE(Int, a.part[i] & b.part[i]); }
INLINE Int operator|(Int a, Int b) { LANEWISE(Int, a.part[i] | b.part[i]); }
INLINE Int operator<<(Int a, int n) { LANEWISE(Int, a.part[i] << n); }
INLINE Int operator>>(Int a, int n) { LANEWISE(Int, a.part[i] >> n); }
INLINE Int operator<(Vec a, Vec b) { LANEWISE(Int, a.part[i] < b.part[i]); }
INLINE Int operator>(Vec a, Vec b) { LANEWISE(Int, a.part[i] > b.part[i]); }
INLINE Int operator<(Int a, Int b) { LANEWISE(Int, a.part[i] < b.part[i]); }
INLINE Vec select(Int mask, Vec yes, Vec no) { LANEWISE(Vec, mask.part[i] ? yes.part[i] : no.part[i]); }
INLINE Vec bits(Int a) { LANEWISE(Vec, (Part)a.part[i]); }
INLINE Int bits(Vec a) { LANEWISE(Int, (IntPart)a.part[i]); }

INLINE Part fma_part(Part a, Part b, Part c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
    return vfmaq_f32(c, a, b);
#else
    return a * b + c;
#endif
}

INLINE Vec fma(Vec a, Vec b, Vec c) { LANEWISE(Vec, fma_part(a.part[i], b.part[i], c.part[i])); }
INLINE Part root_part(Part a) {
#if defined(__AVX512F__)
    return _mm512_sqrt_ps(a);
#elif defined(__AVX2__)
    return _mm256_sqrt_ps(a);
#elif defined(__aarch64__)
    return vsqrtq_f32(a);
#else
    for (int i = 0; i < PART; ++i) a[i] = __builtin_sqrtf(a[i]);
    return a;
#endif
}

INLINE Vec root(Vec a) { LANEWISE(Vec, root_part(a.part[i])); }
INLINE Vec abs(Vec a) { return bits(bits(a) & splat(INT32_MAX)); }

// Returns the second argument where one is NaN.
INLINE Part min_part(Part a, Part b) {
#if defined(__AVX512F__)
    return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_min_ps(a, b);
#else
    return a < b ? a : b;
#endif
}

INLINE Part max_part(Part a, Part b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

INLINE Vec min(Vec a, Vec b) { LANEWISE(Vec, min_part(b.part[i], a.part[i])); }
INLINE Vec max(Vec a, Vec b) { LANEWISE(Vec, max_part(b.part[i], a.part[i])); }

// Loads part by part: for a whole Vec, or with memcpy, GCC copies pieces of 16 bytes through the stack.
INLINE Vec load(const float* p) { LANEWISE(Vec, reinterpret_cast<const LoosePart*>(p)[i]); }

INLINE Int load(const int32_t* p) {
    Int out;
    memcpy(&out, p, sizeof out);
    return out;
}

INLINE void store(float* p, Vec a) {
    for (int i = 0; i < PARTS; ++i) reinterpret_cast<LoosePart*>(p)[i] = a.part[i];
}

// Loads the first n lanes, where n may be less than LANES; the other lanes are zero.
INLINE Vec load(const float* p, int n) {
    if (n >= LANES) return load(p);
#if defined(__AVX512F__)
    return {_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p)};
#endif
    float lanes[LANES] = {};
    memcpy(lanes, p, n * sizeof *p);
    return load(lanes);
}

INLINE void store(float* p, Vec a, int n) {
    if (n >= LANES) return store(p, a);
#if defined(__AVX512F__)
    return _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), a.part[0]);
#endif
    float lanes[LANES];
    store(lanes, a);
    memcpy(p, lanes, n * sizeof *p);
}

// Returns the mask of the first n lanes.
INLINE Int first(int n) {
    static const int32_t index[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return load(index) < splat(int32_t(n));
}

// Combines the lanes by one fixed tree: lane l with l + 8, then l + 4, l + 2, l + 1.
template <class Combine>
INLINE float reduce(Vec a, Combine combine) {
    UNROLL
    for (int half = PARTS / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) a.part[i] = combine(a.part[i], a.part[i + half]);
    Part x = a.part[0];
#if defined(__AVX512F__)
    x = combine(x, __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    x = combine(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    x = combine(x, __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    x = combine(x, __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
#elif defined(__AVX2__)
    x = combine(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3));
    x = combine(x, __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5));
    x = combine(x, __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6));
#else
    x = combine(x, __builtin_shufflevector(x, x, 2, 3, 0, 1));
    x = combine(x, __builtin_shufflevector(x, x, 1, 0, 3, 2));
#endif
    return x[0];
}

INLINE float sum(Vec a) {
    return reduce(a, [](Part x, Part y) __attribute__((always_inline)) { return x + y; });
}

INLINE float largest(Vec a) {
    return reduce(a, [](Part x, Part y) __attribute__((always_inline)) { return y > x ? y : x; });
}

}  // namespace starflow::STARFLOW_ISA
