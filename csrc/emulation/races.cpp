// Runs the persistent inverse on random weights under several orders of its threads, for scripts/check_races.py. Fails
// if the results differ or are not finite; ThreadSanitizer reports races.
// Arguments: number of a block, thread blocks, number of orders, 1 for bfloat16, stages of the ring.
#include <cstdio>
#include <cstdlib>

#include "../cuda/device.h"
#include "../cuda/persistent_launch.h"

using namespace starflow;
using namespace starflow::cuda;

namespace {

std::mt19937 generator{7};

std::vector<float> random_values(int64_t count, float size = 1) {
    std::vector<float> values(size_t(count) + 4);
    for (float& value : values) value = size * (float(generator() % 2001) - 1000) / 1000;
    return values;
}

Spec block(int number) {
    Spec spec{};
    spec.token_dim = 5, spec.channels = 24, spec.layers = 1, spec.heads = 2, spec.head_dim = 12, spec.kv_heads = 2;
    spec.mlp_dim = 50, spec.bias = true, spec.norm = Norm::layer_norm, spec.mlp = Mlp::gelu, spec.rotary = Rotary::none;
    spec.affine = {Scale::exp, 1.0f};
    if (number >= 1) {
        spec.affine = {Scale::softplus, 4.0f}, spec.rotary = Rotary::interleaved;
        spec.start = spec.qk_norm = spec.post_norm = spec.final_norm = true;
        spec.norm = Norm::rms_norm, spec.mlp = Mlp::swiglu, spec.kv_heads = 1, spec.text_dim = 3;
    }
    return spec;
}

}  // namespace

int main(int count, char** arguments) {
    auto argument = [&](int i, int otherwise) { return i < count ? atoi(arguments[i]) : otherwise; };
    int number = argument(1, 0), blocks = argument(2, 3), orders = argument(3, 4);
    PersistentCall call{};
    Spec& spec = call.spec = block(number);
    spec.bf16 = argument(4, 0);
    // With 70 slots there are two splits, with fewer one.
    int64_t prefix = number ? 2 : 0, B = call.B = 2, T = call.T = number > 1 ? 70 : 3, copies = number ? 2 : 1;
    Schedule& schedule = call.schedule;
    schedule = make_schedule(spec, int(copies * B), prefix, T, 232448, blocks, WARPS, argument(5, 2));
    auto noise = random_values(B * T * spec.token_dim), guidance = random_values(B * T);
    auto weights = random_values(schedule.weights / 4, 0.2f), vectors = random_values(schedule.vectors);
    auto cond = random_values(copies * B * spec.channels), text = random_values(copies * B * prefix * spec.text_dim);
    auto angles = random_values((prefix + T) * spec.head_dim / 2), log_sigma = noise, expected = noise;
    for (float& weight : weights) {
        if (!spec.bf16) break;
        Bf16 pair[2];
        narrow(weight, pair[0]), narrow(0.5f * weight, pair[1]);
        memcpy(&weight, pair, sizeof weight);
    }
    call.weights = reinterpret_cast<const char*>(weights.data()), call.vectors = vectors.data();
    call.cond_slots = 1, call.cond = cond.data(), call.prefix = prefix ? text.data() : nullptr;
    if (spec.rotary != Rotary::none) call.cos = call.sin = angles.data();
    if (copies > 1) call.guidance = guidance.data();
    call.rule = Rule::starflow, call.temperature = 0.7f, call.log_sigma = log_sigma.data(), call.blocks = blocks;
    bool same = true;
    for (int order = 0; order < orders; ++order) {
        auto state = noise;
        std::vector<float> workspace(size_t(schedule.workspace) + 4);
        std::vector<uint32_t> cache(size_t(schedule.cache), ~0u);
        call.state = state.data(), call.workspace = workspace.data(), call.cache = cache.data();
        launch_persistent(call, order);
        if (order == 0) expected = state;
        for (float value : state) same &= std::isfinite(value);
        same &= state == expected;
    }
    puts(same ? "same" : "different");
    return same ? 0 : 1;
}
