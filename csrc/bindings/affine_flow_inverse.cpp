// Op of the inverse affine transform.
#include "bindings.h"

namespace starflow {

namespace {

// Below about this many values, threads cost more than they save.
constexpr int64_t SERIAL = 1 << 14;

// The values of each token are contiguous in z and out; params and guidance are contiguous as a whole.
void affine_flow_inverse(Tensor z, Tensor params, Optional guidance, int64_t scale, double clip, int64_t rule,
                         Tensor out) {
    InverseCall call{};
    check_dims(z, 3), check_token_dim(z.size(2));
    call.B = z.size(0), call.n = z.size(1), call.D = int(z.size(2));
    call.affine = {Scale(scale), float(clip)}, call.rule = Rule(rule);
    call.format = format(z), call.params_format = format(params);
    check_strided(z, z.scalar_type(), {call.B, call.n, call.D});
    check_strided(out, z.scalar_type(), {call.B, call.n, call.D});
    int64_t width = call.affine.scale == Scale::unit ? call.D : 2 * call.D, copies = guidance ? 2 : 1;
    call.params = values(params, params.scalar_type(), copies * call.B * call.n * width);
    call.guidance = data(guidance, call.B * call.n);
    call.z = z.data_ptr(), call.x = out.data_ptr();
    call.z_row = z.stride(0), call.z_token = z.stride(1), call.x_row = out.stride(0), call.x_token = out.stride(1);
    parallel_for(call.B * call.n, SERIAL / call.D + 1,
                 [&](int64_t first, int64_t last) { kernels().affine_flow_inverse(call, first, last); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(starflow_native, m) {
    m.def(
        "affine_flow_inverse(Tensor z, Tensor params, Tensor? guidance, int scale, float clip, int rule, "
        "Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(starflow_native, CPU, m) { m.impl("affine_flow_inverse", TORCH_BOX(&affine_flow_inverse)); }

}  // namespace starflow
