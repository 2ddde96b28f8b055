// Ops of the persistent inverse. They take CUDA tensors, unless STARFLOW_LIBRARY and STARFLOW_DEVICES say otherwise.
#include <vector>

#include "../cuda/persistent_launch.h"
#include "../read_spec.h"
#include "tensors.h"

namespace starflow::cuda {

namespace {

// plan: rows, text states, tokens, bytes of shared memory per thread block, thread blocks, warp steps per stage of the
// ring, most stages.
Schedule read_schedule(const Spec& spec, const std::vector<int64_t>& plan) {
    STD_TORCH_CHECK(plan.size() == 7, "compiled kernels: expected a plan of 7 numbers");
    int64_t rows = plan[0], prefix = plan[1], T = plan[2], limit = plan[3], blocks = plan[4], steps = plan[5],
            most = plan[6];
    bool possible = rows > 0 && rows <= MOST_STREAM_ROWS && prefix >= 0 && T > 0 && limit < TOO_LARGE && blocks > 0 &&
                    blocks <= 65536 && steps > 0 && steps % WARPS == 0 && steps <= 1024 && most > 0 &&
                    most <= MOST_STAGES;
    STD_TORCH_CHECK(possible, "compiled kernels: the plan does not fit the call");
    return make_schedule(spec, int(rows), prefix, T, limit, int(blocks), int(steps), int(most));
}

// Returns: stages of the ring; bytes of shared memory; 1 if all weights stay on chip, else 0; bytes of weights; floats of
// vectors; values of cache; floats of workspace.
std::vector<int64_t> persistent_schedule(std::vector<int64_t> fields, std::vector<int64_t> plan) {
    Schedule schedule = read_schedule(read_spec(fields, 0), plan);
    return {schedule.stages,  schedule.bytes, schedule.resident, schedule.weights,
            schedule.vectors, schedule.cache, schedule.workspace};
}

// workspace: zeros. plan: as in persistent_schedule.
void persistent_inverse(Tensor state, Tensor log_sigma, Tensor weights, Tensor vectors, std::vector<int64_t> fields,
                        double clip, Tensor cache, Tensor workspace, Optional positions, Optional cond, Optional prefix,
                        Optional cos, Optional sin, Optional guidance, int64_t rule, double temperature, Optional known,
                        std::vector<int64_t> plan, int64_t stream) {
    check_dims(state, 3);
    PersistentCall call{};
    call.spec = read_spec(fields, clip);
    const Spec& spec = call.spec;
    int64_t B = call.B = state.size(0), T = call.T = state.size(1), copies = guidance ? 2 : 1;
    const Schedule& schedule = call.schedule = read_schedule(spec, plan);
    int64_t L = schedule.prefix, barriers = (2 + 5 * int64_t(spec.layers)) * plan[4];
    STD_TORCH_CHECK(plan[0] == copies * B && plan[2] == T && schedule.stages > 0 && schedule.bytes < TOO_LARGE &&
                        schedule.slots < TOO_LARGE / barriers && !L == !prefix,
                    "compiled kernels: the plan does not fit the call");
    auto values = [&](const Tensor& tensor, ScalarType type, int64_t count) {
        STD_TORCH_CHECK(tensor.device() == state.device(), "compiled kernels: tensors are on different devices");
        void* data = contiguous_values(tensor, type, count);
        return data;
    };
    auto data = [&](const Optional& tensor, int64_t count) {
        return tensor ? static_cast<float*>(values(*tensor, ScalarType::Float, count)) : nullptr;
    };
    auto aligned = [&](void* at) {
        STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(at) % 16 == 0, "compiled kernels: a buffer is not aligned");
        return at;
    };
    ScalarType type = spec.bf16 ? ScalarType::BFloat16 : ScalarType::Float;
    int64_t width = spec.bf16 ? 2 : 4;
    call.state = data(state, B * T * spec.token_dim);
    call.log_sigma = data(log_sigma, B * T * spec.token_dim);
    call.weights = static_cast<const char*>(aligned(values(weights, type, schedule.weights / width)));
    call.vectors = data(vectors, schedule.vectors);
    call.cache = aligned(values(cache, type, schedule.cache));
    call.workspace = static_cast<float*>(aligned(data(workspace, schedule.workspace)));
    STD_TORCH_CHECK(spec.rotary == Rotary::none || (cos && sin), "compiled kernels: cos or sin is missing");
    STD_TORCH_CHECK(spec.positions ? positions && T <= spec.positions : !positions,
                    "compiled kernels: positions do not fit the block");
    call.positions = data(positions, int64_t(spec.positions) * spec.channels);
    call.cond_slots = cond && cond->dim() == 3 ? T : 1;
    call.cond = data(cond, copies * B * call.cond_slots * spec.channels);
    call.prefix = data(prefix, copies * B * L * spec.text_dim);
    call.cos = data(cos, (L + T) * (spec.head_dim / 2));
    call.sin = data(sin, (L + T) * (spec.head_dim / 2));
    call.guidance = data(guidance, B * T);
    if (known) call.known = static_cast<const int64_t*>(values(*known, ScalarType::Long, B));
    call.rule = Rule(rule);
    call.temperature = float(temperature);
    call.blocks = int(plan[4]);
    launch_persistent(call, stream);
}

}  // namespace

#ifndef STARFLOW_LIBRARY
#define STARFLOW_LIBRARY starflow_cuda
#define STARFLOW_DEVICES CUDA
#endif

STABLE_TORCH_LIBRARY_FRAGMENT(STARFLOW_LIBRARY, m) {
    m.def("persistent_schedule(int[] spec, int[] plan) -> int[]");
    m.def(
        "persistent_inverse(Tensor(a!) state, Tensor(b!) log_sigma, Tensor weights, Tensor vectors, int[] spec, float "
        "clip, Tensor(c!) cache, Tensor(d!) workspace, Tensor? positions, Tensor? cond, Tensor? prefix, Tensor? cos, "
        "Tensor? sin, Tensor? guidance, int rule, float temperature, Tensor? known, int[] plan, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(STARFLOW_LIBRARY, CompositeExplicitAutograd, m) {
    m.impl("persistent_schedule", TORCH_BOX(&persistent_schedule));
}

STABLE_TORCH_LIBRARY_IMPL(STARFLOW_LIBRARY, STARFLOW_DEVICES, m) {
    m.impl("persistent_inverse", TORCH_BOX(&persistent_inverse));
}

}  // namespace starflow::cuda
