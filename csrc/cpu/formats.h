// Conversion of rows of values in memory, float32 or narrower, to floats and back.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace starflow::STARFLOW_ISA {

typedef uint16_t HalfPart __attribute__((vector_size(PART * 2)));

INLINE Int select(Int mask, Int yes, Int no) { LANEWISE(Int, mask.part[i] ? yes.part[i] : no.part[i]); }

INLINE Int load_halves(const uint16_t* p, int n) {
    HalfPart lanes[PARTS] = {};
    memcpy(lanes, p, (n < LANES ? n : LANES) * sizeof *p);
    LANEWISE(Int, __builtin_convertvector(lanes[i], IntPart));
}

INLINE void store_halves(uint16_t* p, Int a, int n) {
    HalfPart lanes[PARTS];
    for (int i = 0; i < PARTS; ++i) lanes[i] = __builtin_convertvector(a.part[i], HalfPart);
    memcpy(p, lanes, (n < LANES ? n : LANES) * sizeof *p);
}

// Converts the bits of a float16 to a float. A product moves the exponent from bias 15 to 127; subnormals stay exact.
INLINE Vec from_float16(Int h) {
    Int size = (h & splat(0x7fff)) << 13, sign = (h & splat(0x8000)) << 16;
    Int special = splat(0x0f7fffff) < size;
    Int value = bits(bits(size) * splat(0x1p112f));
    return bits(select(special, size | splat(0x7f800000), value) | sign);
}

// Rounds to the nearest float16, ties to even.
INLINE Int to_float16(Vec x) {
    Int sign = (bits(x) >> 16) & splat(0x8000), size = bits(abs(x));
    Int normal = (size + splat(0xfff - (112 << 23)) + ((size >> 13) & splat(1))) >> 13;
    // A float in [0.5, 1) has the same unit in the last place as a subnormal float16.
    Int small = bits(abs(x) + splat(0.5f)) - splat(0x3f000000);
    Int finite = select(size < splat(0x38800000), small, normal);
    Int large = select(splat(0x7f800000) < size, splat(0x7e00), splat(0x7c00));
    return select(size < splat(0x477ff000), finite, large) | sign;
}

INLINE Int to_bfloat16(Vec x) {
    Int rounded = (bits(x) + splat(0x7fff) + ((bits(x) >> 16) & splat(1))) >> 16;
    return select(splat(0x7f800000) < bits(abs(x)), splat(0x7fc0), rounded);
}

// Calls f(i, count) for each vector of n values; the vector at i holds `count` of them.
template <class Function>
INLINE void each(int64_t n, Function f) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) f(i, LANES);
    if (i < n) f(i, int(n - i));
}

// Reads the values at .. at + n - 1 of an array as floats; `to` is filled up with zeros to a whole vector.
inline void read(const void* from, Format format, int64_t at, int64_t n, float* to) {
    auto floats = static_cast<const float*>(from) + at;
    auto halves = static_cast<const uint16_t*>(from) + at;
    auto wide = [](Int h) __attribute__((always_inline)) { return bits(h << 16); };
    if (format == Format::float32)
        each(n, [&](int64_t i, int count) { store(to + i, load(floats + i, count)); });
    else if (format == Format::bfloat16)
        each(n, [&](int64_t i, int count) { store(to + i, wide(load_halves(halves + i, count))); });
    else
        each(n, [&](int64_t i, int count) { store(to + i, from_float16(load_halves(halves + i, count))); });
}

// Writes n floats to the places at .. at + n - 1 of an array.
inline void write(void* to, Format format, int64_t at, int64_t n, const float* from) {
    auto floats = static_cast<float*>(to) + at;
    auto halves = static_cast<uint16_t*>(to) + at;
    if (format == Format::float32)
        each(n, [&](int64_t i, int count) { store(floats + i, load(from + i), count); });
    else if (format == Format::bfloat16)
        each(n, [&](int64_t i, int count) { store_halves(halves + i, to_bfloat16(load(from + i)), count); });
    else
        each(n, [&](int64_t i, int count) { store_halves(halves + i, to_float16(load(from + i)), count); });
}

// Returns the values that read() gives, without a copy where they are floats already.
inline const float* floats(const void* from, Format format, int64_t at, int64_t n, float* room) {
    if (format == Format::float32) return static_cast<const float*>(from) + at;
    read(from, format, at, n, room);
    return room;
}

}  // namespace starflow::STARFLOW_ISA
