// Sizes and options of a flow block, shared by the CPU and CUDA kernels.
#pragma once

namespace starflow {

enum class Scale { exp, softplus, unit };
enum class Rule { tarflow, starflow, itarflow };
enum class Norm { layer_norm, rms_norm, none };
enum class Mlp { gelu, swiglu };
enum class Rotary { none, interleaved, half };

struct Affine {
    Scale scale;
    float clip;  // 0: no soft clip
};

// The fields of BlockSpec in starflow_kernels/spec.py.
struct Spec {
    int token_dim, channels, layers, heads, head_dim, kv_heads, mlp_dim, positions, text_dim, transition_dim;
    bool start, flip, bias, qk_norm, qk_layer_norm, post_norm, final_norm, adaptive, bf16;
    bool rounded;  // inputs of products are rounded to bfloat16 too
    Mlp mlp;
    Norm norm;
    Rotary rotary;
    Affine affine;

    constexpr int params_dim() const { return affine.scale == Scale::unit ? token_dim : 2 * token_dim; }
    // Branches of a layer that a condition modulates, each by a scale, a shift and a gate of `channels` values.
    constexpr int branches() const { return adaptive ? (transition_dim ? 2 : 1) : 0; }
    constexpr int cond_dim() const { return channels * (1 + 3 * branches() * layers); }
    constexpr int qkv_dim() const { return (heads + 2 * kv_heads) * head_dim; }
};

}  // namespace starflow
