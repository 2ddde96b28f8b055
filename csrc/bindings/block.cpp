// Ops of a whole flow block.
#include "bindings.h"

#include "../cpu/model.h"
#include "../cpu/workspace.h"

namespace starflow {

namespace {

void parallel_for(int64_t n, RangeFunction function, void* context) {
    torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { function(begin, end, context); });
}

// (floats of KV cache a row of `cached` tokens, floats of workspace a thread), see block/cpu.py.
std::vector<int64_t> block_sizes(std::vector<int64_t> spec, int64_t passed, int64_t cached) {
    Spec read = read_spec(spec, 0);
    return {cache_floats(read, cached), workspace_floats(read, passed, cached)};
}

// `tokens` is the data of the density direction, or with params null the state of sampling.
void block_run(Tensor tokens, Optional params, Tensor packed, std::vector<int64_t> offsets, std::vector<int64_t> spec,
               double clip, Optional cond, Optional prefix, Optional cos, Optional sin, Optional guidance, int64_t rule,
               double temperature, Tensor cache, Tensor workspace, std::vector<int64_t> plan) {
    Spec read = read_spec(spec, clip);
    Model model(read, data(packed), offsets);
    BlockCall call{};
    call.block = &model.block;
    call.B = tokens.size(0);
    call.T = tokens.size(1);
    call.L = prefix ? prefix->size(1) : 0;
    call.copies = guidance ? 2 : 1;
    call.params = data(params);
    (params ? const_cast<float*&>(call.input) : call.state) = data(tokens);
    call.cond = data(cond);
    call.prefix = data(prefix);
    call.cos = data(cos);
    call.sin = data(sin);
    call.guidance = data(guidance);
    call.rule = Rule(rule);
    call.temperature = float(temperature);
    call.cache = data(cache);
    call.first = plan.at(0);
    call.last = plan.at(1);
    call.group = plan.at(2);
    call.chunk = plan.at(3);
    int64_t threads = plan.at(4), floats = workspace.numel() / threads;
    run_groups(parallel_for, int(threads), call, data(workspace), floats);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(starflow_native, m) {
    m.def("block_sizes(int[] spec, int passed, int cached) -> int[]");
    m.def(
        "block_run(Tensor(a!) tokens, Tensor(b!)? params, Tensor packed, int[] offsets, int[] spec, float clip, "
        "Tensor? cond, Tensor? prefix, Tensor? cos, Tensor? sin, Tensor? guidance, int rule, float temperature, "
        "Tensor(c!) cache, Tensor(d!) workspace, int[] plan) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(starflow_native, CompositeExplicitAutograd, m) {
    m.impl("block_sizes", TORCH_BOX(&block_sizes));
}

STABLE_TORCH_LIBRARY_IMPL(starflow_native, CPU, m) {
    m.impl("block_run", TORCH_BOX(&block_run));
}

}  // namespace starflow
