// Parts of the linear layer that the ops of a whole layer share.
#pragma once

#include <algorithm>

#include "bindings.h"

namespace starflow {

inline int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Packs the weight of a call.
inline void pack(const LinearCall& call) {
    constexpr int64_t SERIAL = 1 << 15;
    parallel_for(parts(call.N, 16), SERIAL / call.K + 1,
                 [&](int64_t first, int64_t last) { kernels().pack(call, first, last); });
}

// Computes the gradients of weight and bias. OUTPUTS: a thread takes multiples of this number. SERIAL: below about this
// many multiply-adds, threads cost more than they save.
inline void weight_gradient(const LinearCall& call) {
    constexpr int64_t OUTPUTS = 6, SERIAL = 1 << 20;
    parallel_for(parts(call.N, OUTPUTS), SERIAL / (OUTPUTS * call.M * call.K) + 1, [&](int64_t first, int64_t last) {
        kernels().linear_weight_gradient(call, first * OUTPUTS, std::min(call.N, last * OUTPUTS));
    });
}

}  // namespace starflow
