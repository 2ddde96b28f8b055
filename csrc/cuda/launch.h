// The call of the on-chip kernel, declared without CUDA headers.
#pragma once

#include "plan.h"

namespace starflow::cuda {

// The inverse of one flow block for B sequences of T tokens. Under guidance there are 2B rows: row b with the
// condition, row B + b without. Pointers are to device memory.
struct OnchipCall {
    Spec spec;
    Plan plan;
    int64_t B, T;
    int64_t cond_slots;      // T for a condition per token, 1 for one per row
    float* state;            // (B, T, D) noise that becomes data
    float* log_sigma;        // (B, T, D) log scales of the tokens that are computed
    const void* weights;     // plan.weight_bytes per rank of a cluster, as in shared memory; 16-byte aligned
    void* cache;             // blocks x plan.group x copies rows, of the dtype of the weights, or null if on chip
    const float* positions;  // (T, C) in the block's own order, or null
    const float* cond;       // (copies B, cond_slots, C) or null
    const float *cos, *sin;  // (T, head_dim / 2) or null
    const float* guidance;   // (B, T) or null
    const int64_t* known;    // (B,) numbers of first tokens that are data in the state; or null
    Rule rule;
    float temperature;
    int blocks;  // thread blocks of the grid; a cluster takes one group after the other
};

// Starts the kernel on a stream. Throws std::runtime_error with CUDA's reason.
void launch_onchip(const OnchipCall& call, int64_t stream);

}  // namespace starflow::cuda
