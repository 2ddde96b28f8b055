// The kernels as torch ops, on the stable ABI. Private: the public ops are those of the Python package.
#include <sys/mman.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/model.h"
#include "cpu/workspace.h"

namespace {

using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

float* data(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }
float* data(const Optional& tensor) { return tensor ? data(*tensor) : nullptr; }

void parallel_for(int64_t n, starflow::RangeFunction function, void* context) {
    torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { function(begin, end, context); });
}

// (floats of KV cache a row of `cached` tokens, floats of workspace a thread), see block/cpu.py.
std::vector<int64_t> block_sizes(std::vector<int64_t> spec, int64_t passed, int64_t cached) {
    starflow::Spec read = starflow::read_spec(spec, 0);
    return {starflow::cache_floats(read, cached), starflow::workspace_floats(read, passed, cached)};
}

// `tokens` is the data of the density direction, or with params null the state of sampling.
void block_run(Tensor tokens, Optional params, Tensor packed, std::vector<int64_t> offsets, std::vector<int64_t> spec,
               double clip, Optional cond, Optional prefix, Optional cos, Optional sin, Optional guidance, int64_t rule,
               double temperature, Tensor cache, Tensor workspace, std::vector<int64_t> plan) {
    starflow::Spec read = starflow::read_spec(spec, clip);
    starflow::Model model(read, data(packed), offsets);
    starflow::BlockCall call{};
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
    call.rule = starflow::Rule(rule);
    call.temperature = float(temperature);
    call.cache = data(cache);
    call.first = plan.at(0);
    call.last = plan.at(1);
    call.group = plan.at(2);
    call.chunk = plan.at(3);
    int64_t threads = plan.at(4), floats = workspace.numel() / threads;
    starflow::run_groups(parallel_for, int(threads), call, data(workspace), floats);
}

// Ask for huge pages behind a large tensor that has not been written yet: weights stream faster through them.
void use_huge_pages(Tensor tensor) {
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t page = 4096;
    auto start = (reinterpret_cast<uintptr_t>(tensor.data_ptr()) + page - 1) / page * page;
    auto end = (reinterpret_cast<uintptr_t>(tensor.data_ptr()) + tensor.numel() * sizeof(float)) / page * page;
    if (end > start) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#endif
}

// Rough number of values below which threads cost more than they bring.
constexpr int64_t SERIAL = 1 << 14;

starflow::AffineCall affine_call(const Tensor& x, const Tensor& params, int64_t scale, double clip, bool shift, bool flip,
                                 int64_t logdet) {
    starflow::AffineCall call{};
    call.B = x.size(0), call.T = x.size(1), call.D = int(x.size(2));
    call.affine = {starflow::Scale(scale), float(clip)};
    call.shift = shift, call.flip = flip, call.logdet = starflow::Logdet(logdet);
    call.x = data(x), call.params = data(params);
    return call;
}

template <class Kernel>
void run_chunks(const starflow::AffineCall& call, Kernel kernel) {
    int64_t chunks = call.B * call.chunks(), grain = SERIAL / (call.chunk() * call.D) + 1;
    torch::stable::parallel_for(0, chunks, grain, [&](int64_t first, int64_t last) { kernel(call, first, last); });
}

void affine_flow(Tensor x, Tensor params, int64_t scale, double clip, bool shift, bool flip, int64_t logdet, Tensor z,
                 Tensor out) {
    auto call = affine_call(x, params, scale, clip, shift, flip, logdet);
    call.z = data(z), call.logdets = data(out);
    std::vector<double> partial(call.logdet == starflow::Logdet::none ? 0 : call.B * call.chunks());
    call.partial = partial.data();
    run_chunks(call, starflow::kernels().affine_flow);
    if (partial.empty()) return;
    for (int64_t row = 0; row < call.B; ++row) {
        double total = 0;
        for (int64_t i = 0; i < call.chunks(); ++i) total += partial[row * call.chunks() + i];
        if (call.logdet == starflow::Logdet::mean) total /= double(call.T * call.D);
        call.logdets[row] = float(-total);
    }
}

void affine_flow_backward(Optional grad_z, Optional grad_logdet, Tensor z, Tensor x, Tensor params, int64_t scale,
                          double clip, bool shift, bool flip, int64_t logdet, Tensor grad_x, Tensor grad_params) {
    auto call = affine_call(x, params, scale, clip, shift, flip, logdet);
    call.saved_z = data(z), call.grad_z = data(grad_z), call.grad_logdet = data(grad_logdet);
    call.grad_x = data(grad_x), call.grad_params = data(grad_params);
    run_chunks(call, starflow::kernels().affine_flow_backward);
}

void elementary(Tensor x, int64_t which, Tensor out) {
    starflow::kernels().elementary(starflow::Elementary(which), data(x), data(out), x.numel());
}

std::string instruction_set() { return starflow::kernels().name; }

}  // namespace

STABLE_TORCH_LIBRARY(starflow_native, m) {
    m.def("instruction_set() -> str");
    m.def(
        "affine_flow(Tensor x, Tensor params, int scale, float clip, bool shift, bool flip, int logdet, Tensor(a!) z, "
        "Tensor(b!) out) -> ()");
    m.def(
        "affine_flow_backward(Tensor? grad_z, Tensor? grad_logdet, Tensor z, Tensor x, Tensor params, int scale, "
        "float clip, bool shift, bool flip, int logdet, Tensor(a!) grad_x, Tensor(b!) grad_params) -> ()");
    m.def("elementary(Tensor x, int which, Tensor(a!) out) -> ()");
    m.def("use_huge_pages(Tensor tensor) -> ()");
    m.def("block_sizes(int[] spec, int passed, int cached) -> int[]");
    m.def(
        "block_run(Tensor(a!) tokens, Tensor(b!)? params, Tensor packed, int[] offsets, int[] spec, float clip, "
        "Tensor? cond, Tensor? prefix, Tensor? cos, Tensor? sin, Tensor? guidance, int rule, float temperature, "
        "Tensor(c!) cache, Tensor(d!) workspace, int[] plan) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(starflow_native, CompositeExplicitAutograd, m) {
    m.impl("instruction_set", TORCH_BOX(&instruction_set));
    m.impl("block_sizes", TORCH_BOX(&block_sizes));
}

STABLE_TORCH_LIBRARY_IMPL(starflow_native, CPU, m) {
    m.impl("affine_flow", TORCH_BOX(&affine_flow));
    m.impl("affine_flow_backward", TORCH_BOX(&affine_flow_backward));
    m.impl("elementary", TORCH_BOX(&elementary));
    m.impl("use_huge_pages", TORCH_BOX(&use_huge_pages));
    m.impl("block_run", TORCH_BOX(&block_run));
}
