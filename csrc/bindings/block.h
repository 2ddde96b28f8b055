// Arguments that the ops of a whole flow block share.
#pragma once

#include "bindings.h"

#include "../cpu/model.h"
#include "../cpu/transposed.h"

namespace starflow {

// Fills the arguments that all calls share, except tokens, weights and plan.
inline BlockCall call_of(const Model& model, const Tensor& tokens, const Optional& cond, const Optional& prefix,
                         const Optional& cos, const Optional& sin, const Optional& guidance, int64_t rule,
                         double temperature, const Tensor& cache) {
    check_dims(tokens, 3);
    if (prefix) check_dims(*prefix, 3);
    BlockCall call{};
    call.block = &model.block;
    call.B = tokens.size(0);
    call.T = tokens.size(1);
    call.L = prefix ? prefix->size(1) : 0;
    call.copies = guidance ? 2 : 1;
    const Spec& spec = model.block.spec;
    STD_TORCH_CHECK(!prefix || spec.text_dim, "native kernels: the block takes no prefix");
    STD_TORCH_CHECK(spec.rotary == Rotary::none || (cos && sin), "native kernels: cos or sin is missing");
    STD_TORCH_CHECK(!spec.adaptive || cond, "native kernels: an adaptive block needs a condition");
    STD_TORCH_CHECK(!spec.positions || call.T <= spec.positions, "native kernels: more tokens than positions");
    int64_t rows = call.copies * call.B, angles = (call.L + call.T) * (spec.head_dim / 2);
    call.cond_slots = cond && cond->dim() == 3 ? call.T : 1;
    call.cond = data(cond, rows * call.cond_slots * spec.cond_dim());
    call.prefix = data(prefix, rows * call.L * spec.text_dim);
    call.cos = data(cos, angles);
    call.sin = data(sin, angles);
    call.guidance = data(guidance, call.B * call.T);
    call.rule = Rule(rule);
    call.temperature = float(temperature);
    call.cache = data(cache);
    return call;
}

inline void check_plan(bool fits) { STD_TORCH_CHECK(fits, "native kernels: the plan does not fit the call"); }

// Runs calls one after the other on up to `threads` threads, see run_groups. passed: tokens per pass, over all rows of a
// team.
inline void run(const std::vector<BlockCall>& calls, int64_t passed, const Tensor& cache, const Tensor& workspace,
                int64_t threads, double* seconds = nullptr) {
    check_plan(threads > 0 && passed > 0);
    int64_t floats = workspace.numel() / threads;
    for (const BlockCall& call : calls) {
        const Spec& spec = call.block->spec;
        STD_TORCH_CHECK(!spec.rounded || (spec.bf16 && has_bf16_products()),
                        "native kernels: the processor has no products of bfloat16 values");
        int64_t slots = call.L + call.T, rows = call.one_cache() ? call.copies * call.B : 0;
        int64_t cached = threads * own_cache_floats(call) + rows * cache_floats(spec, slots);
        STD_TORCH_CHECK(cache.numel() >= cached && floats >= workspace_floats(spec, passed, slots),
                        "native kernels: the cache or the workspace is too small");
    }
    if (calls[0].B && calls[0].T) run_groups(torch_parallel_for, int(threads), calls, data(workspace), floats, seconds);
}

}  // namespace starflow
