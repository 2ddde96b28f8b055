// Ops of the affine transform.
#include "bindings.h"

#include <algorithm>

namespace starflow {

namespace {

// Below about this many values, threads cost more than they save.
constexpr int64_t SERIAL = 1 << 14;

// Values per chunk: each loop over a chunk covers several cache lines.
constexpr int64_t CHUNK = 512;

AffineCall affine_call(const Tensor& x, const Tensor& params, int64_t scale, double clip, bool shift, bool flip,
                       int64_t logdet) {
    AffineCall call{};
    check_dims(x, 3), check_token_dim(x.size(2));
    call.B = x.size(0), call.T = x.size(1), call.D = int(x.size(2));
    call.chunk = std::max<int64_t>(1, CHUNK / call.D);
    call.affine = {Scale(scale), float(clip)};
    call.shift = shift, call.flip = flip, call.logdet = Logdet(logdet);
    call.x_format = format(x), call.params_format = format(params);
    call.x = values(x, x.scalar_type(), ANY);
    call.params = values(params, params.scalar_type(), call.B * call.T * call.P());
    return call;
}

template <class Kernel>
void run_chunks(const AffineCall& call, Kernel kernel) {
    int64_t chunks = call.B * call.chunks(), grain = SERIAL / (call.chunk * call.D) + 1;
    parallel_for(chunks, grain, [&](int64_t first, int64_t last) { kernel(call, first, last); });
}

void affine_flow(Tensor x, Tensor params, int64_t scale, double clip, bool shift, bool flip, int64_t logdet, Tensor z,
                 Tensor out) {
    auto call = affine_call(x, params, scale, clip, shift, flip, logdet);
    call.z = values(z, x.scalar_type(), x.numel());
    call.logdets = data(out, call.logdet == Logdet::none ? x.numel() : call.B);
    std::vector<double> partial(call.logdet == Logdet::none ? 0 : call.B * call.chunks());
    call.partial = partial.data();
    run_chunks(call, kernels().affine_flow);
    if (partial.empty()) return;
    sum_logdets(call);
}

void affine_flow_backward(Optional grad_z, Optional grad_logdet, Tensor z, Tensor x, Tensor params, int64_t scale,
                          double clip, bool shift, bool flip, int64_t logdet, Tensor grad_x, Tensor grad_params) {
    auto call = affine_call(x, params, scale, clip, shift, flip, logdet);
    call.saved_z = values(z, x.scalar_type(), x.numel());
    if (grad_z) call.grad_z = values(*grad_z, x.scalar_type(), x.numel());
    call.grad_logdet = data(grad_logdet, call.logdet == Logdet::none ? x.numel() : call.B);
    call.grad_x = values(grad_x, x.scalar_type(), x.numel());
    call.grad_params = values(grad_params, params.scalar_type(), params.numel());
    run_chunks(call, kernels().affine_flow_backward);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(starflow_native, m) {
    m.def(
        "affine_flow(Tensor x, Tensor params, int scale, float clip, bool shift, bool flip, int logdet, Tensor(a!) z, "
        "Tensor(b!) out) -> ()");
    m.def(
        "affine_flow_backward(Tensor? grad_z, Tensor? grad_logdet, Tensor z, Tensor x, Tensor params, int scale, "
        "float clip, bool shift, bool flip, int logdet, Tensor(a!) grad_x, Tensor(b!) grad_params) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(starflow_native, CPU, m) {
    m.impl("affine_flow", TORCH_BOX(&affine_flow));
    m.impl("affine_flow_backward", TORCH_BOX(&affine_flow_backward));
}

}  // namespace starflow
