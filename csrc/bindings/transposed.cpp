// Op that solves J^T u = g for a flow block.
#include "block.h"

namespace starflow {

namespace {

int64_t floats_per_thread(const Spec& spec, int64_t group, int64_t chunk, int64_t cached) {
    return std::max(workspace_floats(spec, group * chunk, cached), gradient_floats(spec, group, cached));
}

// Returns the floats per row of kept values and of gradients of keys and values, and of workspace per thread.
std::vector<int64_t> transposed_sizes(std::vector<int64_t> spec, int64_t tokens, int64_t prefix, int64_t group,
                                      int64_t chunk) {
    Spec read = read_spec(spec, 0);
    int64_t cached = prefix + tokens;
    return {tokens * Kept(read).slot, read.layers * read.kv_heads * head_gradients_floats(read, tokens, cached),
            floats_per_thread(read, group, chunk, cached)};
}

// Runs the slots plan[0] .. plan[1] - 1 of the density pass that keeps values or, if plan[5] is set, solves for them,
// the last one first. The passes keep chunks of plan[3] slots. cache: keys and values, then values and keys.
void block_transposed(Tensor x, Tensor g, Tensor u, Tensor params, Tensor packed, std::vector<int64_t> offsets,
                      Tensor transposed, std::vector<int64_t> transposed_offsets, std::vector<int64_t> spec,
                      double clip, Optional cond, Optional prefix, Optional cos, Optional sin, Optional known,
                      Tensor cache, Tensor kept, Tensor heads, Tensor workspace, std::vector<int64_t> plan) {
    Model model(read_spec(spec, clip), data(packed), packed.numel(), offsets);
    TransposedModel back(model.block.spec, data(transposed), transposed.numel(), transposed_offsets);
    BlockCall call = call_of(model, x, cond, prefix, cos, sin, std::nullopt, 0, 1, cache);
    const Spec& sizes = model.block.spec;
    int64_t values = call.B * call.T * sizes.token_dim, cached = call.L + call.T;
    call.input = data(x, values);
    call.params = data(params, call.B * call.T * sizes.params_dim());
    if (known) call.known = static_cast<const int64_t*>(starflow::values(*known, ScalarType::Long, call.B));
    call.kept = data(kept, call.B * call.T * Kept(sizes).slot);
    call.exchanged = call.cache + call.B * cache_floats(sizes, cached);
    back.solve.g = data(g, values);
    back.solve.u = data(u, values);
    int64_t row = sizes.layers * sizes.kv_heads * head_gradients_floats(sizes, call.T, cached);
    back.solve.heads = data(heads, call.B * row);
    check_plan(plan.size() == 6);
    call.first = plan[0];
    call.last = plan[1];
    call.group = plan[2];
    call.chunk = plan[3];
    if (plan[5]) call.transposed = &back.solve;
    int64_t slots = sizes.start ? call.T : call.T - 1, least = plan[5] ? 0 : -call.L;
    check_plan(call.group > 0 && call.chunk > 0 && plan[4] > 0 && call.first >= least && call.last <= slots);
    auto between = [&](int64_t slot) { return slot <= 0 || slot == slots || slot % call.chunk == 0; };
    check_plan(plan[5] || (between(call.first) && between(call.last)));
    STD_TORCH_CHECK(cache.numel() >= 2 * call.B * cache_floats(sizes, cached) &&
                        workspace.numel() / plan[4] >= floats_per_thread(sizes, call.group, call.chunk, cached),
                    "native kernels: the cache or the workspace is too small");
    run({call}, call.group * call.chunk, cache, workspace, plan[4]);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(starflow_native, m) {
    m.def("transposed_sizes(int[] spec, int tokens, int prefix, int group, int chunk) -> int[]");
    m.def(
        "block_transposed(Tensor x, Tensor g, Tensor(a!) u, Tensor(b!) params, Tensor packed, int[] offsets, "
        "Tensor transposed, int[] transposed_offsets, int[] spec, float clip, Tensor? cond, Tensor? prefix, "
        "Tensor? cos, Tensor? sin, Tensor? known, Tensor(c!) cache, Tensor(d!) kept, Tensor(e!) heads, "
        "Tensor(f!) workspace, int[] plan) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(starflow_native, CompositeExplicitAutograd, m) {
    m.impl("transposed_sizes", TORCH_BOX(&transposed_sizes));
}

STABLE_TORCH_LIBRARY_IMPL(starflow_native, CPU, m) { m.impl("block_transposed", TORCH_BOX(&block_transposed)); }

}  // namespace starflow
