// Ops of the on-chip inverse. They take CUDA tensors, unless STARFLOW_LIBRARY and STARFLOW_DEVICES say otherwise.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <vector>

#include "../cuda/launch.h"
#include "../read_spec.h"

namespace starflow::cuda {

namespace {

using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

const float* data(const Optional& tensor) { return tensor ? static_cast<const float*>(tensor->data_ptr()) : nullptr; }

// Returns: thread blocks per cluster; samples per cluster, 0 where none fits; 1 if the KV cache is on chip, else 0.
// Then, per thread block: bytes of weights; values of KV cache per sample; bytes of shared memory with one sample.
std::vector<int64_t> onchip_plan(std::vector<int64_t> fields, int64_t T, int64_t copies, int64_t B, int64_t limit,
                                 int64_t processors, int64_t most_cluster) {
    Spec spec = read_spec(fields, 0);
    Plan plan = choose_plan(spec, T, int(copies), B, limit, processors, int(most_cluster));
    Plan one = make_plan(spec, T, int(copies), 1, plan.cached_on_chip, plan.cluster);
    return {plan.cluster, plan.group, plan.cached_on_chip, plan.weight_bytes, copies * one.cache_row, one.bytes};
}

// cache: in device memory; none if the cache is on chip.
// plan: thread blocks per cluster, samples per cluster, number of thread blocks, stream.
void onchip_inverse(Tensor state, Tensor weights, std::vector<int64_t> fields, double clip, Optional cache,
                    Optional positions, Optional cond, Optional cos, Optional sin, Optional guidance, int64_t rule,
                    double temperature, std::vector<int64_t> plan) {
    OnchipCall call{};
    call.spec = read_spec(fields, clip);
    call.B = state.size(0);
    call.T = state.size(1);
    call.plan = make_plan(call.spec, call.T, guidance ? 2 : 1, int(plan.at(1)), !cache, int(plan.at(0)));
    if (weights.numel() * int64_t(weights.element_size()) != int64_t(call.plan.cluster) * call.plan.weight_bytes)
        throw std::invalid_argument("packed weights: not of the size that the block spec gives");
    call.state = static_cast<float*>(state.data_ptr());
    call.weights = weights.data_ptr();
    if (cache) call.cache = cache->data_ptr();
    call.positions = data(positions);
    call.cond = data(cond);
    call.cos = data(cos);
    call.sin = data(sin);
    call.guidance = data(guidance);
    call.rule = Rule(rule);
    call.temperature = float(temperature);
    call.blocks = int(plan.at(2));
    launch_onchip(call, plan.at(3));
}

}  // namespace

#ifndef STARFLOW_LIBRARY
#define STARFLOW_LIBRARY starflow_cuda
#define STARFLOW_DEVICES CUDA
#endif

STABLE_TORCH_LIBRARY_FRAGMENT(STARFLOW_LIBRARY, m) {
    m.def("onchip_plan(int[] spec, int T, int copies, int B, int limit, int processors, int cluster) -> int[]");
    m.def(
        "onchip_inverse(Tensor(a!) state, Tensor weights, int[] spec, float clip, Tensor(b!)? cache, "
        "Tensor? positions, Tensor? cond, Tensor? cos, Tensor? sin, Tensor? guidance, int rule, "
        "float temperature, int[] plan) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(STARFLOW_LIBRARY, CompositeExplicitAutograd, m) {
    m.impl("onchip_plan", TORCH_BOX(&onchip_plan));
}

STABLE_TORCH_LIBRARY_IMPL(STARFLOW_LIBRARY, STARFLOW_DEVICES, m) {
    m.impl("onchip_inverse", TORCH_BOX(&onchip_inverse));
}

}  // namespace starflow::cuda
