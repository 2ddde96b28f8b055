#include "model.h"

#include <algorithm>
#include <chrono>

#include "packed.h"

namespace starflow {

Model::Model(const Spec& spec, const float* packed, int64_t floats, const std::vector<int64_t>& offsets)
    : layers_(spec.layers) {
    PackedWeights weights(packed, floats, offsets, spec.bf16);
    auto next = [&](int64_t width, int64_t rows = 1) { return weights.next(width, rows); };
    auto linear = [&](int out, int in) { return weights.linear(out, in); };
    int C = spec.channels;
    auto norm = [&] {
        NormWeights weights{};
        if (spec.norm != Norm::none) weights.weight = next(C);
        if (spec.norm == Norm::layer_norm) weights.bias = next(C);
        return weights;
    };
    block = {};
    block.spec = spec;
    block.proj_in = linear(C, spec.token_dim);
    if (spec.positions) block.positions = next(C, spec.positions);
    if (spec.start) block.start = next(spec.token_dim);
    if (spec.text_dim) block.proj_text = linear(C, spec.text_dim);
    for (Layer& layer : layers_) {
        layer = {};
        layer.attn_norm = norm();
        layer.qkv = linear(spec.qkv_dim(), C);
        if (spec.qk_norm) layer.q_norm = next(spec.head_dim), layer.k_norm = next(spec.head_dim);
        if (spec.qk_layer_norm) {
            int queries = spec.heads * spec.head_dim, keys = spec.kv_heads * spec.head_dim;
            layer.q_layer_norm = {next(queries), next(queries)};
            layer.k_layer_norm = {next(keys), next(keys)};
        }
        layer.proj = linear(C, spec.heads * spec.head_dim);
        if (spec.post_norm) layer.attn_post_norm = next(C);
        layer.mlp_norm = norm();
        if (spec.mlp == Mlp::swiglu) layer.gate = linear(spec.mlp_dim, C);
        layer.up = linear(spec.mlp_dim, C);
        layer.down = linear(C, spec.mlp_dim);
        if (spec.post_norm) layer.mlp_post_norm = next(C);
        if (spec.transition_dim) {
            Linear gate = linear(spec.transition_dim, C), up = linear(spec.transition_dim, C);
            layer.transition = {gate, up, linear(C, spec.transition_dim)};
        }
    }
    if (spec.final_norm) block.final_norm = next(C);
    block.proj_out = linear(spec.params_dim(), C);
    block.layers = layers_.data();
    weights.finish();
    // The last layer is followed by the first one of the next token.
    std::vector<Linear*> order;
    for (Layer& layer : layers_) {
        auto& [gate, up, down] = layer.transition;
        for (Linear* each : {&layer.qkv, &layer.proj, &layer.gate, &layer.up, &layer.down, &gate, &up, &down})
            if (each->weight) order.push_back(each);
    }
    for (size_t i = 0; i < order.size(); ++i) order[i]->following = order[(i + 1) % order.size()];
}

TransposedModel::TransposedModel(const Spec& spec, const float* packed, int64_t floats,
                                 const std::vector<int64_t>& offsets)
    : layers_(spec.layers) {
    PackedWeights weights(packed, floats, offsets, spec.bf16);
    int C = spec.channels;
    solve = {};
    solve.proj_in = weights.linear(spec.token_dim, C);
    for (Transposed::Layer& layer : layers_) {
        layer = {};
        layer.qkv = weights.linear(C, spec.qkv_dim());
        layer.proj = weights.linear(spec.heads * spec.head_dim, C);
        if (spec.mlp == Mlp::swiglu) layer.gate = weights.linear(C, spec.mlp_dim);
        layer.up = weights.linear(C, spec.mlp_dim);
        layer.down = weights.linear(spec.mlp_dim, C);
    }
    solve.proj_out = weights.linear(C, spec.params_dim());
    solve.layers = layers_.data();
    weights.finish();
}

int64_t own_cache_floats(const BlockCall& call) {
    return call.one_cache() ? 0 : call.group * call.copies * cache_floats(call.block->spec, call.L + call.T);
}

void run_groups(ParallelFor parallel_for, int threads, const std::vector<BlockCall>& calls, float* workspace,
                int64_t floats, double* seconds) {
    struct Work {
        const std::vector<BlockCall>& calls;
        float* workspace;
        int64_t floats, cache;
        double* seconds;
    } work{calls, workspace, floats, 0, seconds};
    for (const BlockCall& call : calls) work.cache = std::max(work.cache, own_cache_floats(call));
    auto group = [](int64_t group, int thread, int leader, Team& team, void* context) {
        const auto& [calls, workspace, floats, cache, seconds] = *static_cast<const Work*>(context);
        const BlockCall& any = calls[0];
        auto run = any.jacobi ? kernels().run_jacobi : any.transposed ? kernels().run_transposed : kernels().run_block;
        auto now = std::chrono::steady_clock::now;
        for (size_t i = 0; i < calls.size(); ++i) {
            auto start = now();
            run(calls[i], group, any.cache + leader * cache, workspace + leader * floats, workspace + thread * floats,
                team);
            if (seconds && !leader && !team.rank) seconds[i] += std::chrono::duration<double>(now() - start).count();
        }
    };
    run_pieces(parallel_for, threads, (calls[0].B + calls[0].group - 1) / calls[0].group, group, &work);
}

}  // namespace starflow
