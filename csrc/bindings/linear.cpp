// Ops of the linear layer.
#include "linear.h"

#include <algorithm>

namespace starflow {

namespace {

// ROWS: rows per product. SERIAL: below about this many multiply-adds, threads cost more than they save.
constexpr int64_t ROWS = 48, SERIAL = 1 << 20;

// Computes y (M, N) = x (M, K) w^T + bias; w is (N, K), or (K, N) if `across`.
void multiply(LinearCall call) {
    Floats packed(parts(call.N, 16) * 16 * call.K, Floats::anything);
    call.packed = packed.data();
    pack(call);
    parallel_for(parts(call.M, ROWS), SERIAL / (ROWS * call.N * call.K) + 1, [&](int64_t first, int64_t last) {
        Floats scratch(ROWS * 64, Floats::anything);
        for (int64_t part = first; part < last; ++part)
            kernels().linear(call, part * ROWS, std::min(call.M, (part + 1) * ROWS), scratch.data());
    });
}

void linear(Tensor x, Tensor weight, bool across, Optional bias, bool sigmoid, Tensor y) {
    check_dims(x, 2), check_dims(weight, 2);
    int64_t M = x.size(0), N = weight.size(across ? 1 : 0), K = x.size(1);
    check_positive({N, K});
    check_strided(y, ScalarType::Float, {M, N});
    LinearCall call{M, N, K, data(x), data(weight, N * K), across, nullptr, data(bias, N)};
    call.y = static_cast<float*>(y.data_ptr());
    call.stride = M > 1 ? y.stride(0) : N;
    call.sigmoid = sigmoid;
    STD_TORCH_CHECK(call.stride >= N, "native kernels: the rows of a result overlap");
    multiply(call);
}

void linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor grad_x, Tensor grad_weight, Optional grad_bias) {
    check_dims(x, 2), check_dims(weight, 2);
    int64_t M = x.size(0), N = weight.size(0), K = weight.size(1);
    check_positive({M, N, K});
    float *from = data(grad, M * N), *to = data(grad_weight, N * K);
    LinearCall input{M, K, N, from, data(weight), true, nullptr, nullptr, data(grad_x, M * K)};
    input.stride = K;
    multiply(input);
    weight_gradient({M, N, K, data(x, M * K), nullptr, false, nullptr, nullptr, from, to, data(grad_bias, N)});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(starflow_native, m) {
    m.def("linear(Tensor x, Tensor weight, bool across, Tensor? bias, bool sigmoid, Tensor(a!) y) -> ()");
    m.def(
        "linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor(a!) grad_x, Tensor(b!) grad_weight, "
        "Tensor(c!)? grad_bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(starflow_native, CPU, m) {
    m.impl("linear", TORCH_BOX(&linear));
    m.impl("linear_backward", TORCH_BOX(&linear_backward));
}

}  // namespace starflow
