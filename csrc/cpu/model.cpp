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
        std::vector<Barrier> barriers;
    } work{calls, workspace, floats, 0, seconds, std::vector<Barrier>(threads)};
    for (const BlockCall& call : calls) work.cache = std::max(work.cache, own_cache_floats(call));
    auto member = [](int thread, int threads, void* context) {
        auto& work = *static_cast<Work*>(context);
        const BlockCall& any = work.calls[0];
        int groups = int((any.B + any.group - 1) / any.group);
        // With fewer groups than threads, each group gets a team of threads. The teams are as equal in size as
        // possible.
        int teams = groups < threads ? groups : threads;
        int mine = int(int64_t(thread) * teams / threads);
        auto leader = [&](int team) { return int((int64_t(team) * threads + teams - 1) / teams); };
        int first = leader(mine);
        Team team{thread - first, leader(mine + 1) - first, &work.barriers[mine]};
        auto run = any.jacobi ? kernels().run_jacobi : any.transposed ? kernels().run_transposed : kernels().run_block;
        auto now = std::chrono::steady_clock::now;
        for (int group = mine; group < groups; group += teams)
            for (size_t i = 0; i < work.calls.size(); ++i) {
                auto start = now();
                run(work.calls[i], group, any.cache + first * work.cache, work.workspace + first * work.floats,
                    work.workspace + thread * work.floats, team);
                if (work.seconds && !thread) work.seconds[i] += std::chrono::duration<double>(now() - start).count();
            }
    };
    run_together(parallel_for, threads, member, &work);
}

}  // namespace starflow
