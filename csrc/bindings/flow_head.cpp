// Ops of the flow head.
#include "bindings.h"

#include <algorithm>

namespace starflow {

namespace {

// TOKENS: most tokens per tile. STATES, VALUES: most values that a tile keeps in cache. SERIAL: below about this many
// multiply-adds, threads cost more than they save. SLABS: most parts of a sum over tokens. TILES: fewest tiles of one.
constexpr int64_t TOKENS = 48, STATES = 1 << 16, VALUES = 8192, SERIAL = 1 << 20, SLABS = 16, TILES = 4;

int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

// A call whose outputs are not set yet, and the packed weights that it points to.
struct Head {
    HeadCall call{};
    Floats weight, across, bias;

    Head(const Tensor& x, const Tensor& h, const Tensor& given, const Optional& given_bias, const Optional& norm,
         int64_t scale, double clip, bool shift, bool flip, int64_t logdet, bool gradient) {
        AffineCall& affine = call.affine;
        check_dims(x, 3), check_dims(h, 3), check_token_dim(x.size(2)), check_positive({h.size(2)});
        affine.B = x.size(0), affine.T = x.size(1), affine.D = int(x.size(2));
        affine.affine = {Scale(scale), float(clip)};
        affine.shift = shift, affine.flip = flip, affine.logdet = Logdet(logdet);
        affine.x = data(x);
        int64_t C = call.C = int(h.size(2)), P = affine.P(), D = affine.D;
        affine.chunk = std::max<int64_t>(1, std::min({TOKENS, STATES / C, VALUES / D, affine.T}));
        call.h = data(h, affine.B * affine.T * C), call.norm = norm.has_value();
        bias = Floats(padded(P), Floats::zeros);
        if (given_bias) std::copy_n(data(given_bias, P), P, bias.data());
        call.bias = bias.data();
        const float *given_norm = data(norm, C), *from = data(given, P * C);
        auto weight_of = [=](int64_t p, int64_t c) {
            return given_norm ? float(from[p * C + c] * (1.0 + given_norm[c])) : from[p * C + c];
        };
        if (!call.narrow()) {
            weight = Floats(padded(P) * C, Floats::zeros);
            float* to = weight.data();
            for (int64_t p = 0; p < P; ++p)
                for (int64_t c = 0; c < C; ++c) to[(p / 16 * C + c) * 16 + p % 16] = weight_of(p, c);
            call.weight = weight.data();
        }
        if (!call.narrow() && !gradient) return;
        int64_t outputs = call.outputs();
        across = Floats(padded(C) * outputs, Floats::zeros);
        float* to = across.data();
        for (int64_t p = 0; p < P; ++p)
            for (int64_t c = 0; c < C; ++c) to[(c / 16 * outputs + p) * 16 + c % 16] = weight_of(p, c);
        call.across = across.data();
    }
    int64_t chunks() const { return call.affine.B * call.affine.chunks(); }
    // Fewest chunks that are worth a thread.
    int64_t grain() const { return SERIAL / (call.affine.chunk * call.C * call.affine.P()) + 1; }
    Floats room() const { return Floats(call.room_floats(), Floats::anything); }
};

void flow_head(Tensor x, Tensor h, Tensor weight, Optional bias, Optional norm, int64_t scale, double clip, bool shift,
               bool flip, int64_t logdet, Tensor z, Tensor out) {
    Head head(x, h, weight, bias, norm, scale, clip, shift, flip, logdet, false);
    AffineCall& affine = head.call.affine;
    affine.z = data(z, x.numel()), affine.logdets = data(out, affine.logdet == Logdet::none ? x.numel() : affine.B);
    std::vector<double> partial(affine.logdet == Logdet::none ? 0 : head.chunks());
    affine.partial = partial.data();
    parallel_for(head.chunks(), head.grain(), [&](int64_t first, int64_t last) {
        HeadCall own = head.call;
        Floats room = head.room();
        own.room = room.data();
        kernels().flow_head(own, first, last);
    });
    if (!partial.empty()) sum_logdets(affine);
}

void flow_head_backward(Optional grad_z, Optional grad_logdet, Tensor z, Tensor x, Tensor h, Tensor weight,
                        Optional bias, Optional norm, int64_t scale, double clip, bool shift, bool flip, int64_t logdet,
                        Tensor grad_x, Tensor grad_h, Tensor grad_weight, Optional grad_bias, Optional grad_norm) {
    Head head(x, h, weight, bias, norm, scale, clip, shift, flip, logdet, true);
    AffineCall& affine = head.call.affine;
    affine.saved_z = data(z, x.numel()), affine.grad_z = data(grad_z, x.numel());
    affine.grad_logdet = data(grad_logdet, affine.logdet == Logdet::none ? x.numel() : affine.B);
    affine.grad_x = data(grad_x, x.numel());
    head.call.grad_h = data(grad_h, h.numel());
    int64_t C = head.call.C, P = affine.P(), wide_C = padded(C), wide_P = padded(P), chunks = head.chunks();
    // Each slab sums its chunks in order, and the slabs are added in order, whatever the number of threads.
    int64_t slabs = std::clamp<int64_t>(chunks / TILES, 1, SLABS), size = wide_P * (wide_C + 2);
    Floats found(slabs * size, Floats::zeros);
    float* sums = found.data();
    int64_t grain = std::max<int64_t>(1, head.grain() * slabs / std::max<int64_t>(1, chunks));
    parallel_for(slabs, grain, [&](int64_t first, int64_t last) {
        HeadCall own = head.call;
        Floats room = head.room();
        own.room = room.data();
        for (int64_t slab = first; slab < last; ++slab) {
            own.grad_weight = sums + slab * size;
            own.grad_bias = own.grad_weight + wide_P * wide_C;
            kernels().flow_head_backward(own, chunks * slab / slabs, chunks * (slab + 1) / slabs);
        }
    });
    auto total = [&](int64_t i) {
        double sum = 0;
        for (int64_t slab = 0; slab < slabs; ++slab) sum += sums[slab * size + i];
        return sum;
    };
    const float *from = data(weight), *given_norm = data(norm);
    float *to_weight = data(grad_weight, P * C), *to_norm = data(grad_norm, C), *to_bias = data(grad_bias, P);
    parallel_for(C, SERIAL / (slabs * P) + 1, [&](int64_t first, int64_t last) {
        for (int64_t c = first; c < last; ++c) {
            double along = 0;
            for (int64_t p = 0; p < P; ++p) {
                double product = total(p * wide_C + c);
                along += product * from[p * C + c];
                to_weight[p * C + c] = float(given_norm ? product * (1.0 + given_norm[c]) : product);
            }
            if (to_norm) to_norm[c] = float(along);
        }
    });
    if (!to_bias) return;
    for (int64_t p = 0; p < P; ++p) to_bias[p] = float(total(wide_P * wide_C + p) - total(wide_P * (wide_C + 1) + p));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(starflow_native, m) {
    m.def(
        "flow_head(Tensor x, Tensor h, Tensor weight, Tensor? bias, Tensor? norm_weight, int scale, float clip, "
        "bool shift, bool flip, int logdet, Tensor(a!) z, Tensor(b!) out) -> ()");
    m.def(
        "flow_head_backward(Tensor? grad_z, Tensor? grad_logdet, Tensor z, Tensor x, Tensor h, Tensor weight, "
        "Tensor? bias, Tensor? norm_weight, int scale, float clip, bool shift, bool flip, int logdet, "
        "Tensor(a!) grad_x, Tensor(b!) grad_h, Tensor(c!) grad_weight, Tensor(d!)? grad_bias, "
        "Tensor(e!)? grad_norm_weight) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(starflow_native, CPU, m) {
    m.impl("flow_head", TORCH_BOX(&flow_head));
    m.impl("flow_head_backward", TORCH_BOX(&flow_head_backward));
}

}  // namespace starflow
