// Ops of a whole flow block.
#include "block.h"

namespace starflow {

namespace {

// Returns the floats of KV cache per row of `cached` tokens and of workspace per thread; see block/native.py.
std::vector<int64_t> block_sizes(std::vector<int64_t> spec, int64_t passed, int64_t cached) {
    Spec read = read_spec(spec, 0);
    return {cache_floats(read, cached), workspace_floats(read, passed, cached)};
}

// Runs the density direction on the data `tokens` if params is given, else sampling, where `tokens` is the state.
void block_run(Tensor tokens, Optional params, Optional log_sigma, Tensor packed, std::vector<int64_t> offsets,
               std::vector<int64_t> spec, double clip, Optional cond, Optional prefix, Optional cos, Optional sin,
               Optional guidance, int64_t rule, double temperature, Optional known, Tensor cache, Tensor workspace,
               std::vector<int64_t> plan) {
    Model model(read_spec(spec, clip), data(packed), packed.numel(), offsets);
    BlockCall call = call_of(model, tokens, cond, prefix, cos, sin, guidance, rule, temperature, cache);
    if (known) call.known = static_cast<const int64_t*>(values(*known, ScalarType::Long, call.B));
    call.params = data(params, call.B * call.T * model.block.spec.params_dim());
    int64_t values = call.B * call.T * model.block.spec.token_dim;
    (params ? const_cast<float*&>(call.input) : call.state) = data(tokens, values);
    call.log_sigma = data(log_sigma, values);
    check_plan(plan.size() == 6);
    call.first = plan[0];
    call.last = plan[1];
    call.group = plan[2];
    call.chunk = plan[3];
    call.filled = plan[5];
    int64_t slots = params || model.block.spec.start ? call.T : call.T - 1;
    check_plan(bool(params) != bool(log_sigma) && !(params && (guidance || known || call.filled)) && call.filled >= 0 &&
               call.first >= -call.L && call.last <= slots && call.group > 0 && call.chunk > 0);
    run({call}, call.group * call.copies * call.chunk, cache, workspace, plan[4]);
}

static_assert(sizeof(Place) == 7 * sizeof(int64_t), "a row of the tensor `places`");

// Returns the floats of memory for a sequence of `tokens` tokens, see Jacobi.
int64_t jacobi_floats(int64_t tokens, int64_t token_dim, int64_t neighbours) {
    Jacobi solver{};
    solver.neighbours = neighbours;
    return solver.memory_floats(tokens, token_dim);
}

// Continues the Jacobi iteration for `noise`. `tokens` holds its current values, and places, sweeps and residual hold
// its progress.
void block_jacobi(Tensor tokens, Tensor log_sigma, Tensor noise, Tensor packed, std::vector<int64_t> offsets,
                  std::vector<int64_t> spec, double clip, Optional cond, Optional prefix, Optional cos, Optional sin,
                  Optional guidance, int64_t rule, double temperature, std::vector<int64_t> neighbours, double tol,
                  Tensor places, Tensor sweeps, Tensor residual, Tensor memory, Tensor cache, Tensor workspace,
                  std::vector<int64_t> plan) {
    Model model(read_spec(spec, clip), data(packed), packed.numel(), offsets);
    BlockCall call = call_of(model, tokens, cond, prefix, cos, sin, guidance, rule, temperature, cache);
    Jacobi solver{};
    solver.noise = data(noise, tokens.numel());
    solver.tol = float(tol);
    solver.neighbours = int64_t(neighbours.size());
    solver.offsets = neighbours.data();
    solver.memory = data(memory, call.B * solver.memory_floats(call.T, model.block.spec.token_dim));
    solver.places = static_cast<Place*>(values(places, ScalarType::Long, call.B * sizeof(Place) / sizeof(int64_t)));
    solver.sweeps = static_cast<int32_t*>(values(sweeps, ScalarType::Int, call.B * call.T));
    solver.residual = data(residual, call.B);
    check_plan(plan.size() == 4);
    solver.window = plan[0];
    solver.slide = plan[1];
    solver.passes = plan[2];
    call.jacobi = &solver;
    call.state = data(tokens, call.B * call.T * model.block.spec.token_dim);
    call.log_sigma = data(log_sigma, tokens.numel());
    call.group = 1;
    for (int64_t distance : neighbours) check_plan(distance > 0);
    for (int64_t row = 0; row < call.B; ++row) {
        const Place& place = solver.places[row];
        STD_TORCH_CHECK(place.done >= !model.block.spec.start && place.done <= call.T && place.last_first >= 0 &&
                            place.last_end <= call.T,
                        "native kernels: the progress of a sequence is out of range");
    }
    run({call}, call.copies * solver.window, cache, workspace, plan[3]);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(starflow_native, m) {
    m.def("block_sizes(int[] spec, int passed, int cached) -> int[]");
    m.def(
        "block_run(Tensor(a!) tokens, Tensor(b!)? params, Tensor(e!)? log_sigma, Tensor packed, int[] offsets, "
        "int[] spec, float clip, "
        "Tensor? cond, Tensor? prefix, Tensor? cos, Tensor? sin, Tensor? guidance, int rule, float temperature, "
        "Tensor? known, Tensor(c!) cache, Tensor(d!) workspace, int[] plan) -> ()");
    m.def(
        "block_jacobi(Tensor(a!) tokens, Tensor(h!) log_sigma, Tensor noise, Tensor packed, int[] offsets, int[] spec, "
        "float clip, "
        "Tensor? cond, Tensor? prefix, Tensor? cos, Tensor? sin, Tensor? guidance, int rule, float temperature, "
        "int[] neighbours, float tol, Tensor(b!) places, Tensor(c!) sweeps, Tensor(d!) residual, Tensor(e!) memory, "
        "Tensor(f!) cache, Tensor(g!) workspace, int[] plan) -> ()");
    m.def("jacobi_floats(int tokens, int token_dim, int neighbours) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(starflow_native, CompositeExplicitAutograd, m) {
    m.impl("block_sizes", TORCH_BOX(&block_sizes));
    m.impl("jacobi_floats", TORCH_BOX(&jacobi_floats));
}

STABLE_TORCH_LIBRARY_IMPL(starflow_native, CPU, m) {
    m.impl("block_run", TORCH_BOX(&block_run));
    m.impl("block_jacobi", TORCH_BOX(&block_jacobi));
}

}  // namespace starflow
