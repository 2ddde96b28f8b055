// The affine transform in the sampling direction.
#include "affine.h"
#include "formats.h"

namespace starflow::STARFLOW_ISA {

namespace {

constexpr int64_t MOST = MAX_TOKEN_DIM + LANES;

}  // namespace

void affine_flow_inverse(const InverseCall& call, int64_t first_token, int64_t last_token) {
    alignas(64) float noise[MOST], with[2 * MOST], without[2 * MOST];
    int64_t D = call.D, P = call.affine.scale == Scale::unit ? D : 2 * D;
    for (int64_t token = first_token; token < last_token; ++token) {
        int64_t b = token / call.n, t = token % call.n, to = b * call.x_row + t * call.x_token;
        const float* z = floats(call.z, call.format, b * call.z_row + t * call.z_token, D, noise);
        const float* params = floats(call.params, call.params_format, token * P, P, with);
        const float* others = nullptr;
        if (call.guidance) others = floats(call.params, call.params_format, (call.B * call.n + token) * P, P, without);
        float* x = call.format == Format::float32 ? static_cast<float*>(call.x) + to : noise;
        float weight = call.guidance ? call.guidance[token] : 0;
        affine_inverse(z, params, others, weight, call.D, call.rule, call.affine, x, nullptr);
        if (x == noise) write(call.x, call.format, to, D, x);
    }
}

}  // namespace starflow::STARFLOW_ISA
