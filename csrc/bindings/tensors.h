// Checks of the tensors of a call, shared by the CPU and CUDA ops.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace starflow {

using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

using torch::headeronly::ScalarType;

// Number of values that is not checked.
constexpr int64_t ANY = -1;

inline void check_dims(const Tensor& tensor, int64_t dims) {
    STD_TORCH_CHECK(tensor.dim() == dims, "compiled kernels: a tensor has the wrong number of dimensions");
}

// Returns the values of a contiguous tensor, after a check of its dtype and number of values.
inline void* contiguous_values(const Tensor& tensor, ScalarType type, int64_t count) {
    STD_TORCH_CHECK(tensor.scalar_type() == type, "compiled kernels: a tensor is of the wrong dtype");
    STD_TORCH_CHECK(tensor.is_contiguous(), "compiled kernels: a tensor is not contiguous");
    STD_TORCH_CHECK(count == ANY || tensor.numel() == count, "compiled kernels: a tensor is of the wrong size");
    return tensor.data_ptr();
}

}  // namespace starflow
