// Helpers shared by the torch ops of this folder. These ops are private; the Python package has the public ones.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
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
