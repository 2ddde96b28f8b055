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

}  // namespace starflow
