// Passes over values around a solve. Below this number of values the calling thread does them alone, since the threads of
// OpenMP spin for milliseconds afterwards, and take cores from the solve.
#include <atomic>

#include "bindings.h"

namespace starflow {

namespace {

constexpr int64_t PARALLEL = 1 << 20;

bool finite(Tensor tensor) {
    const float* values = data(tensor);
    std::atomic<bool> found{true};
    parallel_for(tensor.numel(), PARALLEL, [&](int64_t first, int64_t last) {
        if (!all_finite(values + first, last - first)) found = false;
    });
    return found;
}

// Sets the state of a solve to its noise, and its log scales to zero.
void start(Tensor noise, Tensor state, Tensor log_sigma) {
    int64_t count = noise.numel();
    float *from = data(noise), *to = data(state, count), *scales = data(log_sigma, count);
    parallel_for(count, PARALLEL, [&](int64_t first, int64_t last) {
        std::memcpy(to + first, from + first, (last - first) * sizeof(float));
        std::memset(scales + first, 0, (last - first) * sizeof(float));
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(starflow_native, m) {
    m.def("all_finite(Tensor tensor) -> bool");
    m.def("start(Tensor noise, Tensor(a!) state, Tensor(b!) log_sigma) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(starflow_native, CPU, m) {
    m.impl("all_finite", TORCH_BOX(&finite));
    m.impl("start", TORCH_BOX(&start));
}

}  // namespace starflow
