// Runs an inverse on random weights under several orders of its threads, for scripts/check_races.py.
#pragma once

#include <cstdio>
#include <cstdlib>

#include "../cuda/device.h"
#include "../spec.h"

// Number of the barrier that the script leaves out.
int removed_barrier = -1;

namespace starflow::cuda {

inline std::vector<float> random_values(int64_t count, float size = 1) {
    static std::mt19937 generator{7};
    std::vector<float> values(size_t(count) + 4);
    for (float& value : values) value = size * (float(generator() % 2001) - 1000) / 1000;
    return values;
}

// Returns random weights of this many bytes.
inline std::vector<float> random_weights(int64_t bytes, bool bf16) {
    auto weights = random_values(bytes / 4, 0.2f);
    for (float& weight : weights) {
        if (!bf16) break;
        Bf16 pair[2];
        narrow(weight, pair[0]), narrow(0.5f * weight, pair[1]);
        memcpy(&weight, pair, sizeof weight);
    }
    return weights;
}

// Returns a plain block, or one with all that a block may have.
inline Spec random_block(bool plain, bool bf16) {
    Spec spec{};
    spec.token_dim = 5, spec.channels = 24, spec.layers = 1, spec.heads = 2, spec.head_dim = 12, spec.kv_heads = 2;
    spec.mlp_dim = 50, spec.bias = true, spec.norm = Norm::layer_norm, spec.mlp = Mlp::gelu, spec.rotary = Rotary::none;
    spec.affine = {Scale::exp, 1.0f}, spec.bf16 = bf16;
    if (!plain) {
        spec.affine = {Scale::softplus, 4.0f}, spec.rotary = Rotary::interleaved;
        spec.start = spec.qk_norm = spec.post_norm = spec.final_norm = true;
        spec.norm = Norm::rms_norm, spec.mlp = Mlp::swiglu, spec.kv_heads = 1, spec.text_dim = 3;
    }
    return spec;
}

// Calls run(state, order), which maps a state in place, in each order. Returns the exit status: 0 if the results are
// finite and the same.
template <class Run>
int compare_orders(int orders, const std::vector<float>& noise, Run run) {
    std::vector<float> expected;
    bool same = true;
    for (int order = 0; order < orders; ++order) {
        auto state = noise;
        run(state.data(), order);
        if (order == 0) expected = state;
        for (float value : state) same &= std::isfinite(value);
        same &= state == expected;
    }
    puts(same ? "same" : "different");
    return same ? 0 : 1;
}

}  // namespace starflow::cuda
