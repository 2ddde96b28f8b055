// Looks for races of the on-chip inverse, see races.h. Arguments: number of the barrier that is left out, number of a
// block, thread blocks of a cluster, number of orders, 1 for bfloat16, 1 for a cache on the chip.
#include "../cuda/launch.h"
#include "races.h"

using namespace starflow;
using namespace starflow::cuda;

int main(int, char** arguments) {
    auto argument = [&](int i) { return atoi(arguments[i]); };
    removed_barrier = argument(1);
    int number = argument(2), cluster = argument(3);
    OnchipCall call{};
    Spec& spec = call.spec = random_block(number == 0, argument(5));
    spec.layers = 2;
    // The only cluster takes one group after the other: two samples, then one.
    int64_t B = call.B = 3, T = call.T = 3, copies = number ? 2 : 1, group = 2;
    const Plan& plan = call.plan = make_plan(spec, T, int(copies), int(group), argument(6), cluster);
    auto noise = random_values(B * T * spec.token_dim), guidance = random_values(B * T), log_sigma = noise;
    auto weights = random_weights(int64_t(cluster) * plan.weight_bytes, spec.bf16);
    auto cond = random_values(copies * B * spec.channels), positions = random_values(T * spec.channels);
    auto angles = random_values(T * spec.head_dim / 2);
    call.weights = weights.data(), call.positions = positions.data(), call.cond_slots = 1, call.cond = cond.data();
    if (spec.rotary != Rotary::none) call.cos = call.sin = angles.data();
    if (copies > 1) call.guidance = guidance.data();
    call.rule = Rule::starflow, call.temperature = 0.7f, call.log_sigma = log_sigma.data(), call.blocks = cluster;
    return compare_orders(argument(4), noise, [&](float* state, int order) {
        std::vector<Vector<uint32_t>> cache(size_t(cluster * group * copies * plan.cache_row), {{~0u, ~0u, ~0u, ~0u}});
        call.state = state, call.cache = plan.cached_on_chip ? nullptr : cache.data();
        launch_onchip(call, order);
    });
}
