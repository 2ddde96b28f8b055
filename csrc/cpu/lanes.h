// Sums and transpose of sixteen vectors at a time, by GCC's shuffles of two vectors into one.
#pragma once

#include <utility>

#include "vec.h"

namespace starflow::STARFLOW_ISA {

// Splits the lanes of a and b into runs of 2 H, and returns the first half of each run plus its second half.
template <int H, int... I>
INLINE Part folded(Part a, Part b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, (I / H * 2 * H + I % H)...) +
           __builtin_shufflevector(a, b, (I / H * 2 * H + I % H + H)...);
}

// Reduces the N vectors part[0 .. N - 1], with sums in runs of 2 H lanes, to N / 2 vectors.
template <int N, int H>
INLINE void fold(Part* part) {
    if constexpr (H > 0) {
        UNROLL
        for (int i = 0; i < N / 2; ++i)
            part[i] = folded<H>(part[2 * i], part[2 * i + 1], std::make_integer_sequence<int, PART>());
        fold<N / 2, H / 2>(part);
    }
}

// Returns a vector whose lane i has the bits of sum(a[i]).
INLINE Vec sums(const Vec (&a)[LANES]) {
    Part part[LANES];
    UNROLL
    for (int i = 0; i < LANES; ++i) {
        Vec x = a[i];
        UNROLL
        for (int half = PARTS / 2; half; half /= 2)
            for (int j = 0; j < half; ++j) x.part[j] = x.part[j] + x.part[j + half];
        part[i] = x.part[0];
    }
    fold<LANES, PART / 2>(part);
    Vec out;
    UNROLL
    for (int i = 0; i < PARTS; ++i) out.part[i] = part[i];
    return out;
}

// With lanes in runs of 2 H, swaps the second half of each run of x with the first half of that of y.
template <int H, int... I>
INLINE void exchange(Part& x, Part& y, std::integer_sequence<int, I...>) {
    Part second = __builtin_shufflevector(x, y, (I & H ? I + PART : I + H)...);
    x = __builtin_shufflevector(x, y, (I & H ? I - H + PART : I)...);
    y = second;
}

template <int H>
INLINE void exchange_all(Part (&a)[PART]) {
    if constexpr (H > 0) {
        UNROLL
        for (int i = 0; i < PART; ++i)
            if (!(i & H)) exchange<H>(a[i], a[i + H], std::make_integer_sequence<int, PART>());
        exchange_all<H / 2>(a);
    }
}

// Sets y (16, 16), rows ldy apart, to the transpose of x, rows ldx apart.
inline void transpose(const float* x, int64_t ldx, float* y, int64_t ldy) {
    for (int i = 0; i < LANES; i += PART)
        for (int j = 0; j < LANES; j += PART) {
            Part a[PART];
            UNROLL
            for (int k = 0; k < PART; ++k) a[k] = *reinterpret_cast<const LoosePart*>(x + (i + k) * ldx + j);
            exchange_all<PART / 2>(a);
            UNROLL
            for (int k = 0; k < PART; ++k) *reinterpret_cast<LoosePart*>(y + (j + k) * ldy + i) = a[k];
        }
}

}  // namespace starflow::STARFLOW_ISA
