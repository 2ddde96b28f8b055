// Helpers shared by the torch ops of this folder. These ops are private; the Python package has the public ones.
#pragma once

#include <cstring>
#include <initializer_list>
#include <memory>
#include <vector>

#include "../cpu/kernels.h"
#include "tensors.h"

namespace starflow {

// Returns the values of a contiguous CPU tensor, after a check of its dtype and number of values.
inline void* values(const Tensor& tensor, ScalarType type, int64_t count) {
    STD_TORCH_CHECK(tensor.is_cpu(), "native kernels: a tensor is not on the CPU");
    return contiguous_values(tensor, type, count);
}

inline float* data(const Tensor& tensor, int64_t count = ANY) {
    return static_cast<float*>(values(tensor, ScalarType::Float, count));
}
inline float* data(const Optional& tensor, int64_t count = ANY) { return tensor ? data(*tensor, count) : nullptr; }

// Checks a tensor that is read by its strides: the values of its last dimension must be adjacent.
inline void check_strided(const Tensor& tensor, ScalarType type, std::initializer_list<int64_t> shape) {
    STD_TORCH_CHECK(tensor.sizes().equals(shape), "native kernels: a tensor is of the wrong shape");
    int64_t last = tensor.dim() - 1;
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == type &&
                        (tensor.stride(last) == 1 || tensor.size(last) == 1 || tensor.numel() == 0),
                    "native kernels: a tensor is of the wrong device, dtype or layout");
}

// Checks sizes that a kernel divides by.
inline void check_positive(std::initializer_list<int64_t> sizes) {
    for (int64_t size : sizes) STD_TORCH_CHECK(size > 0, "native kernels: a tensor is empty");
}

inline void check_token_dim(int64_t D) {
    STD_TORCH_CHECK(D > 0 && D <= MAX_TOKEN_DIM, "native kernels: a token has too few or too many values");
}

inline Format format(const Tensor& tensor) {
    auto type = tensor.scalar_type();
    if (type == ScalarType::Float) return Format::float32;
    if (type == ScalarType::Half) return Format::float16;
    STD_TORCH_CHECK(type == ScalarType::BFloat16, "native kernels: a tensor is of the wrong dtype");
    return Format::bfloat16;
}

// Buffer of floats, zeroed on request. It starts at a cache line: vectors that cross lines load at half the speed.
class Floats {
    struct alignas(64) Line {
        float values[16];
    };
    std::unique_ptr<Line[]> lines;

public:
    enum Start { anything, zeros };
    Floats() = default;
    Floats(int64_t count, Start start) {
        count = (count + 15) / 16;
        lines.reset(start == zeros ? new Line[count]() : new Line[count]);
    }
    float* data() { return reinterpret_cast<float*>(lines.get()); }
};

inline void torch_parallel_for(int64_t n, int64_t grain, RangeFunction function, void* context) {
    torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { function(begin, end, context); });
}

// Calls function(begin, end) on ranges of [0, n), of at least `grain`, on the threads that have cores now.
template <class Function>
void parallel_for(int64_t n, int64_t grain, Function function) {
    auto call = [](int64_t begin, int64_t end, void* context) { (*static_cast<Function*>(context))(begin, end); };
    share(torch_parallel_for, n, grain, call, &function);
}

// Returns whether all values are finite.
inline bool all_finite(const float* values, int64_t count) {
    constexpr uint32_t EXPONENT = 0x7f800000;
    uint32_t infinite = 0;
    for (int64_t i = 0; i < count; ++i) {
        uint32_t bits;
        std::memcpy(&bits, values + i, sizeof bits);
        infinite |= (bits & EXPONENT) == EXPONENT;
    }
    return !infinite;
}

// Computes the log-determinant of each row from the sums of its chunks, added in order.
inline void sum_logdets(const AffineCall& call) {
    for (int64_t row = 0; row < call.B; ++row) {
        double total = 0;
        for (int64_t i = 0; i < call.chunks(); ++i) total += call.partial[row * call.chunks() + i];
        if (call.logdet == Logdet::mean) total /= double(call.T * call.D);
        call.logdets[row] = float(-total);
    }
}

}  // namespace starflow
