// Op of all blocks of a flow in the sampling direction.
#include <algorithm>

#include "block.h"

namespace starflow {

namespace {

bool all_finite(const Optional& tensor) { return !tensor || starflow::all_finite(data(tensor), tensor->numel()); }

// Runs the blocks one after the other, the last one first. context: condition, prefix, cosines, sines and guidance of
// each block. numbers: soft clip and temperature of each block. plan: group and threads; then, for each block, the
// fields of its spec, its guidance rule, its prefix slots per pass and its number of weights. Returns the seconds of
// each block, or nothing if an input or a result is not finite.
std::vector<double> stack_run(Tensor noise, std::vector<Tensor> states, std::vector<Tensor> log_sigma,
                              std::vector<Tensor> packed, std::vector<int64_t> offsets, std::vector<Optional> context,
                              std::vector<double> numbers, Tensor cache, Tensor workspace, std::vector<int64_t> plan) {
    constexpr size_t CONTEXT = 5, NUMBERS = 2, HEAD = 2, PLAN = SPEC_FIELDS + 3;
    size_t count = packed.size();
    check_plan(count && context.size() == CONTEXT * count && numbers.size() == NUMBERS * count &&
               plan.size() == HEAD + PLAN * count && states.size() == count && log_sigma.size() == count);
    std::vector<Model> models;
    std::vector<BlockCall> calls;
    models.reserve(count);
    check_dims(noise, 3);
    int64_t values = noise.numel(), passed = 0, end = offsets.size();
    const float* from = data(noise);
    bool finite = starflow::all_finite(from, values);
    for (size_t i = count; i--;) {
        const int64_t *fields = plan.data() + HEAD + PLAN * i, *options = fields + SPEC_FIELDS;
        check_plan(options[2] >= 0 && options[2] <= end);
        std::vector<int64_t> own(offsets.begin() + (end - options[2]), offsets.begin() + end);
        end -= options[2];
        Spec spec = read_spec({fields, fields + SPEC_FIELDS}, numbers[NUMBERS * i]);
        models.emplace_back(spec, data(packed[i]), packed[i].numel(), own);
        const Optional* given = context.data() + CONTEXT * i;
        finite = finite && all_finite(given[0]) && all_finite(given[1]) && all_finite(given[4]);
        BlockCall call = call_of(models.back(), noise, given[0], given[1], given[2], given[3], given[4], options[0],
                                 numbers[NUMBERS * i + 1], cache);
        call.noise = from;
        from = call.state = data(states[i], values);
        call.log_sigma = data(log_sigma[i], values);
        call.first = -call.L;
        call.last = spec.start ? call.T : call.T - 1;
        call.group = plan[0];
        call.chunk = options[1];
        check_plan(noise.size(2) == spec.token_dim && call.group > 0 && call.chunk > 0);
        passed = std::max(passed, call.group * call.copies * call.chunk);
        calls.push_back(call);
    }
    check_plan(end == 0);
    if (!finite) return {};
    std::vector<double> seconds(count);
    run(calls, passed, cache, workspace, plan[1], seconds.data());
    for (const BlockCall& call : calls)
        if (!starflow::all_finite(call.state, values)) return {};
    std::reverse(seconds.begin(), seconds.end());
    return seconds;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(starflow_native, m) {
    m.def(
        "stack_run(Tensor noise, Tensor(a!)[] states, Tensor(b!)[] log_sigma, Tensor[] packed, int[] offsets, "
        "Tensor?[] context, float[] numbers, Tensor(c!) cache, Tensor(d!) workspace, int[] plan) -> float[]");
}

STABLE_TORCH_LIBRARY_IMPL(starflow_native, CPU, m) { m.impl("stack_run", TORCH_BOX(&stack_run)); }

}  // namespace starflow
