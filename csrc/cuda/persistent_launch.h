// The call of the persistent kernel, declared without CUDA headers.
#pragma once

#include "schedule.h"

namespace starflow::cuda {

// The inverse of one flow block for B sequences of T tokens, in as many rows, twice as many under guidance: row b with
// the condition, row B + b without. Pointers are to device memory.
struct PersistentCall {
    Spec spec;
    Schedule schedule;
    int64_t B, T;
    int64_t cond_slots;      // T for a condition per token, 1 for one per row
    float* state;            // (B, T, D) noise that becomes data
    float* log_sigma;        // (B, T, D) log scales of the tokens that are computed
    const char* weights;     // schedule.weights bytes; 16-byte aligned
    const float* vectors;    // schedule.vectors
    void* cache;             // schedule.cache values of the dtype of the weights; 16-byte aligned
    float* workspace;        // schedule.workspace zeros; 16-byte aligned
    const float* positions;  // (T, C) in the block's own order, or null
    const float* cond;       // (copies B, cond_slots, C) or null
    const float* prefix;     // (copies B, prefix, text_dim) or null
    const float *cos, *sin;  // (prefix + T, head_dim / 2) or null
    const float* guidance;   // (B, T) or null
    const int64_t* known;    // (B,) numbers of first tokens that are data in the state; or null
    Rule rule;
    float temperature;
    int blocks;  // thread blocks of the grid, all running at once
};

// Starts the kernel on a stream. Throws std::runtime_error with CUDA's reason.
void launch_persistent(const PersistentCall& call, int64_t stream);

}  // namespace starflow::cuda
