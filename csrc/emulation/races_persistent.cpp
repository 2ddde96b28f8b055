// Looks for races of the persistent inverse, see races.h. Arguments: number of the barrier that is left out, number of a
// block, thread blocks, number of orders, 1 for bfloat16, stages of the ring.
#include "../cuda/persistent_launch.h"
#include "races.h"

using namespace starflow;
using namespace starflow::cuda;

int main(int, char** arguments) {
    auto argument = [&](int i) { return atoi(arguments[i]); };
    removed_barrier = argument(1);
    int number = argument(2), blocks = argument(3);
    PersistentCall call{};
    Spec& spec = call.spec = random_block(number == 0, argument(5));
    // With 70 slots there are two splits, with fewer one.
    int64_t prefix = number ? 2 : 0, B = call.B = 2, T = call.T = number > 1 ? 70 : 3, copies = number ? 2 : 1;
    Schedule& schedule = call.schedule;
    schedule = make_schedule(spec, int(copies * B), prefix, T, 232448, blocks, WARPS, argument(6));
    auto noise = random_values(B * T * spec.token_dim), guidance = random_values(B * T);
    auto weights = random_weights(schedule.weights, spec.bf16), vectors = random_values(schedule.vectors);
    auto cond = random_values(copies * B * spec.channels), text = random_values(copies * B * prefix * spec.text_dim);
    auto angles = random_values((prefix + T) * spec.head_dim / 2), log_sigma = noise;
    call.weights = reinterpret_cast<const char*>(weights.data()), call.vectors = vectors.data();
    call.cond_slots = 1, call.cond = cond.data(), call.prefix = prefix ? text.data() : nullptr;
    if (spec.rotary != Rotary::none) call.cos = call.sin = angles.data();
    if (copies > 1) call.guidance = guidance.data();
    call.rule = Rule::starflow, call.temperature = 0.7f, call.log_sigma = log_sigma.data(), call.blocks = blocks;
    return compare_orders(argument(4), noise, [&](float* state, int order) {
        std::vector<float> workspace(size_t(schedule.workspace) + 4);
        std::vector<uint32_t> cache(size_t(schedule.cache), ~0u);
        call.state = state, call.workspace = workspace.data(), call.cache = cache.data();
        launch_persistent(call, order);
    });
}
