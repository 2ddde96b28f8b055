// Ops of the on-chip inverse. They take CUDA tensors, unless STARFLOW_LIBRARY and STARFLOW_DEVICES say otherwise.
#include <vector>

#include "../cuda/choice.h"
#include "../cuda/launch.h"
#include "../read_spec.h"
#include "tensors.h"

namespace starflow::cuda {

namespace {

// Returns: thread blocks per cluster; samples per cluster, 0 where none fits; 1 if the KV cache is on chip, else 0.
// Then, per thread block: bytes of weights; values of KV cache per sample; bytes of shared memory with one sample. Last,
// estimated nanoseconds of a token step.
std::vector<int64_t> onchip_plan(std::vector<int64_t> fields, int64_t T, int64_t copies, int64_t B, int64_t limit,
                                 int64_t processors, int64_t most_cluster) {
    Spec spec = read_spec(fields, 0);
    Plan plan = choose_plan(spec, T, int(copies), B, limit, processors, int(most_cluster));
    Plan one = make_plan(spec, T, int(copies), 1, plan.cached_on_chip, plan.cluster);
    int64_t cache = copies * one.cache_row, step = step_nanoseconds(spec, plan);
    return {plan.cluster, plan.group, plan.cached_on_chip, plan.weight_bytes, cache, one.bytes, step};
}

// cache: in device memory; none if the cache is on chip.
// plan: thread blocks per cluster, samples per cluster, number of thread blocks, stream.
void onchip_inverse(Tensor state, Tensor log_sigma, Tensor weights, std::vector<int64_t> fields, double clip,
                    Optional cache, Optional positions, Optional cond, Optional cos, Optional sin, Optional guidance,
                    int64_t rule, double temperature, Optional known, std::vector<int64_t> plan) {
    check_dims(state, 3);
    OnchipCall call{};
    call.spec = read_spec(fields, clip);
    const Spec& spec = call.spec;
    int64_t B = call.B = state.size(0), T = call.T = state.size(1), copies = guidance ? 2 : 1;
    bool fits = plan.size() == 4 && plan[0] > 0 && plan[0] <= MOST_CLUSTER && !(plan[0] & (plan[0] - 1)) &&
                plan[1] > 0 && plan[1] * copies <= MOST_ROWS && plan[2] > 0 && plan[2] % plan[0] == 0;
    STD_TORCH_CHECK(fits && B > 0 && T > 0, "compiled kernels: the plan does not fit the call");
    call.plan = make_plan(spec, T, int(copies), int(plan[1]), !cache, int(plan[0]));
    auto values = [&](const Tensor& tensor, ScalarType type, int64_t count) {
        STD_TORCH_CHECK(tensor.device() == state.device(), "compiled kernels: tensors are on different devices");
        return contiguous_values(tensor, type, count);
    };
    auto data = [&](const Optional& tensor, int64_t count) {
        return tensor ? static_cast<float*>(values(*tensor, ScalarType::Float, count)) : nullptr;
    };
    call.state = data(state, B * T * spec.token_dim);
    call.log_sigma = data(log_sigma, B * T * spec.token_dim);
    call.weights = data(weights, plan[0] * call.plan.weight_bytes / int64_t(sizeof(float)));
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(call.weights) % 16 == 0, "compiled kernels: weights are not aligned");
    if (cache)
        call.cache = values(*cache, spec.bf16 ? ScalarType::BFloat16 : ScalarType::Float,
                            plan[2] * plan[1] * copies * call.plan.cache_row);
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(call.cache) % 16 == 0, "compiled kernels: the cache is not aligned");
    STD_TORCH_CHECK(spec.rotary == Rotary::none || (cos && sin), "compiled kernels: cos or sin is missing");
    STD_TORCH_CHECK(spec.positions ? positions && T <= spec.positions : !positions,
                    "compiled kernels: positions do not fit the block");
    call.positions = data(positions, int64_t(spec.positions) * spec.channels);
    call.cond_slots = cond && cond->dim() == 3 ? T : 1;
    call.cond = data(cond, copies * B * call.cond_slots * spec.channels);
    call.cos = data(cos, T * (spec.head_dim / 2));
    call.sin = data(sin, T * (spec.head_dim / 2));
    call.guidance = data(guidance, B * T);
    if (known) call.known = static_cast<const int64_t*>(values(*known, ScalarType::Long, B));
    call.rule = Rule(rule);
    call.temperature = float(temperature);
    call.blocks = int(plan[2]);
    launch_onchip(call, plan[3]);
}

}  // namespace

#ifndef STARFLOW_LIBRARY
#define STARFLOW_LIBRARY starflow_cuda
#define STARFLOW_DEVICES CUDA
#endif

STABLE_TORCH_LIBRARY_FRAGMENT(STARFLOW_LIBRARY, m) {
    m.def("onchip_plan(int[] spec, int T, int copies, int B, int limit, int processors, int cluster) -> int[]");
    m.def(
        "onchip_inverse(Tensor(a!) state, Tensor(c!) log_sigma, Tensor weights, int[] spec, float clip, Tensor(b!)? "
        "cache, "
        "Tensor? positions, Tensor? cond, Tensor? cos, Tensor? sin, Tensor? guidance, int rule, "
        "float temperature, Tensor? known, int[] plan) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(STARFLOW_LIBRARY, CompositeExplicitAutograd, m) {
    m.impl("onchip_plan", TORCH_BOX(&onchip_plan));
}

STABLE_TORCH_LIBRARY_IMPL(STARFLOW_LIBRARY, STARFLOW_DEVICES, m) {
    m.impl("onchip_inverse", TORCH_BOX(&onchip_inverse));
}

}  // namespace starflow::cuda
