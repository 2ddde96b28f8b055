// The elementary functions on their own, so that their accuracy can be tested.
#include "elementary.h"

#include "kernels.h"

namespace starflow::STARFLOW_ISA {

namespace {

template <class Function>
void map(const float* x, float* y, int64_t n, Function function) {
    for (int64_t i = 0; i < n; i += LANES) {
        int count = n - i < LANES ? int(n - i) : LANES;
        store(y + i, function(load(x + i, count)), count);
    }
}

}  // namespace

void run_elementary(Elementary which, const float* x, float* y, int64_t n) {
    switch (which) {
        case Elementary::exp: return map(x, y, n, [](Vec v) { return exp(v); });
        case Elementary::log: return map(x, y, n, [](Vec v) { return log(v); });
        case Elementary::log1p: return map(x, y, n, [](Vec v) { return log1p(v); });
        case Elementary::tanh: return map(x, y, n, [](Vec v) { return tanh(v); });
        case Elementary::gelu: return map(x, y, n, [](Vec v) { return gelu(v); });
        case Elementary::gelu_tanh: return map(x, y, n, [](Vec v) { return gelu_tanh(v); });
        case Elementary::softplus_one: return map(x, y, n, [](Vec v) { return softplus_one(v); });
    }
}

}  // namespace starflow::STARFLOW_ISA
