// Ops of a whole flow block.
#include "bindings.h"

#include "../cpu/model.h"
#include "../cpu/workspace.h"

namespace starflow {

namespace {

void parallel_for(int64_t n, RangeFunction function, void* context) {
    torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { function(begin, end, context); });
}

// Returns the floats of KV cache per row of `cached` tokens and of workspace per thread; see block/native.py.
std::vector<int64_t> block_sizes(std::vector<int64_t> spec, int64_t passed, int64_t cached) {
    Spec read = read_spec(spec, 0);
    return {cache_floats(read, cached), workspace_floats(read, passed, cached)};
}

// Fills the arguments that both directions share, except tokens, weights and plan.
BlockCall call_of(const Model& model, const Tensor& tokens, const Optional& cond, const Optional& prefix,
                  const Optional& cos, const Optional& sin, const Optional& guidance, int64_t rule, double temperature,
                  const Tensor& cache) {
    BlockCall call{};
    call.block = &model.block;
    call.B = tokens.size(0);
    call.T = tokens.size(1);
    call.L = prefix ? prefix->size(1) : 0;
    call.copies = guidance ? 2 : 1;
    const Spec& spec = model.block.spec;
    int64_t rows = call.copies * call.B, angles = (call.L + call.T) * (spec.head_dim / 2);
    call.cond = data(cond, rows * spec.channels);
    call.prefix = data(prefix, rows * call.L * spec.text_dim);
    call.cos = data(cos, angles);
    call.sin = data(sin, angles);
    call.guidance = data(guidance, call.B * call.T);
    call.rule = Rule(rule);
    call.temperature = float(temperature);
    call.cache = data(cache);
    return call;
}

// Runs the density direction on the data `tokens` if params is given, else sampling, where `tokens` is the state.
void block_run(Tensor tokens, Optional params, Tensor packed, std::vector<int64_t> offsets, std::vector<int64_t> spec,
               double clip, Optional cond, Optional prefix, Optional cos, Optional sin, Optional guidance, int64_t rule,
               double temperature, Tensor cache, Tensor workspace, std::vector<int64_t> plan) {
    Model model(read_spec(spec, clip), data(packed), offsets);
    BlockCall call = call_of(model, tokens, cond, prefix, cos, sin, guidance, rule, temperature, cache);
    call.params = data(params, call.B * call.T * model.block.spec.params_dim());
    (params ? const_cast<float*&>(call.input) : call.state) =
        data(tokens, call.B * call.T * model.block.spec.token_dim);
    call.first = plan.at(0);
    call.last = plan.at(1);
    call.group = plan.at(2);
    call.chunk = plan.at(3);
    int64_t threads = plan.at(4), floats = workspace.numel() / threads;
    run_groups(parallel_for, int(threads), call, data(workspace), floats);
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
void block_jacobi(Tensor tokens, Tensor noise, Tensor packed, std::vector<int64_t> offsets, std::vector<int64_t> spec,
                  double clip, Optional cond, Optional prefix, Optional cos, Optional sin, Optional guidance,
                  int64_t rule, double temperature, std::vector<int64_t> neighbours, double tol, Tensor places,
                  Tensor sweeps, Tensor residual, Tensor memory, Tensor cache, Tensor workspace,
                  std::vector<int64_t> plan) {
    Model model(read_spec(spec, clip), data(packed), offsets);
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
    solver.window = plan.at(0);
    solver.slide = plan.at(1);
    solver.passes = plan.at(2);
    call.jacobi = &solver;
    call.state = data(tokens, call.B * call.T * model.block.spec.token_dim);
    call.group = 1;
    int64_t threads = plan.at(3), floats = workspace.numel() / threads;
    run_groups(parallel_for, int(threads), call, data(workspace), floats);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(starflow_native, m) {
    m.def("block_sizes(int[] spec, int passed, int cached) -> int[]");
    m.def(
        "block_run(Tensor(a!) tokens, Tensor(b!)? params, Tensor packed, int[] offsets, int[] spec, float clip, "
        "Tensor? cond, Tensor? prefix, Tensor? cos, Tensor? sin, Tensor? guidance, int rule, float temperature, "
        "Tensor(c!) cache, Tensor(d!) workspace, int[] plan) -> ()");
    m.def(
        "block_jacobi(Tensor(a!) tokens, Tensor noise, Tensor packed, int[] offsets, int[] spec, float clip, "
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
