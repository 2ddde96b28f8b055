// What the torch ops of this folder share. They are private: the public ops are those of the Python package.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "../cpu/kernels.h"

namespace starflow {

using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

inline float* data(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }
inline float* data(const Optional& tensor) { return tensor ? data(*tensor) : nullptr; }

inline Format format(const Tensor& tensor) {
    auto type = tensor.scalar_type();
    using torch::headeronly::ScalarType;
    return type == ScalarType::Float ? Format::float32 : type == ScalarType::Half ? Format::float16 : Format::bfloat16;
}

// Log-determinants of the rows from the sums of their chunks, in order.
inline void sum_logdets(const AffineCall& call) {
    for (int64_t row = 0; row < call.B; ++row) {
        double total = 0;
        for (int64_t i = 0; i < call.chunks(); ++i) total += call.partial[row * call.chunks() + i];
        if (call.logdet == Logdet::mean) total /= double(call.T * call.D);
        call.logdets[row] = float(-total);
    }
}

}  // namespace starflow
