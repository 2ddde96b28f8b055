// Ops of the flow head.
#include "bindings.h"

#include <algorithm>
#include <memory>

namespace starflow {

namespace {

// Tokens of a tile, within bounds of the values that it keeps in cache; multiply-adds below which threads cost more
// than they bring; parts of the sums over tokens and the fewest tiles of one.
constexpr int64_t TOKENS = 48, STATES = 1 << 16, VALUES = 8192, SERIAL = 1 << 20, SLABS = 16, TILES = 4;

int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

// A call without outputs, and the packed weights that it points to.
struct Head {
    HeadCall call{};
    std::vector<float> weight, transposed, bias;

    Head(const Tensor& x, const Tensor& h, const Tensor& given, const Optional& given_bias, const Optional& norm,
         int64_t scale, double clip, bool shift, bool flip, int64_t logdet, bool gradient) {
        AffineCall& affine = call.affine;
        affine.B = x.size(0), affine.T = x.size(1), affine.D = int(x.size(2));
        affine.affine = {Scale(scale), float(clip)};
        affine.shift = shift, affine.flip = flip, affine.logdet = Logdet(logdet);
        affine.x = x.data_ptr();
        int64_t C = call.C = int(h.size(2)), P = affine.P(), D = affine.D;
        affine.chunk = std::max<int64_t>(1, std::min({TOKENS, STATES / C, VALUES / D, affine.T}));
        call.h = data(h), call.norm = data(norm);
        weight.resize(padded(P) * C);
        bias.resize(padded(P));
        const float* from = data(given);
        for (int64_t p = 0; p < P; ++p)
            for (int64_t c = 0; c < C; ++c) weight[(p / 16 * C + c) * 16 + p % 16] = from[p * C + c];
        if (given_bias) std::copy_n(data(given_bias), P, bias.begin());
        call.weight = weight.data(), call.bias = bias.data();
        if (!gradient) return;
        transposed.resize(padded(C) * P);
        for (int64_t p = 0; p < P; ++p)
            for (int64_t c = 0; c < C; ++c) transposed[(c / 16 * P + p) * 16 + c % 16] = from[p * C + c];
        call.transposed = transposed.data();
    }
    int64_t chunks() const { return call.affine.B * call.affine.chunks(); }
    // Chunks that one thread should take at least.
    int64_t grain() const { return SERIAL / (call.affine.chunk * call.C * call.affine.P()) + 1; }
    std::unique_ptr<float[]> room() const { return std::unique_ptr<float[]>(new float[call.room_floats()]); }
};

void flow_head(Tensor x, Tensor h, Tensor weight, Optional bias, Optional norm, int64_t scale, double clip, bool shift,
               bool flip, int64_t logdet, Tensor z, Tensor out) {
    Head head(x, h, weight, bias, norm, scale, clip, shift, flip, logdet, false);
    AffineCall& affine = head.call.affine;
    affine.z = z.data_ptr(), affine.logdets = data(out);
    std::vector<double> partial(affine.logdet == Logdet::none ? 0 : head.chunks());
    affine.partial = partial.data();
    torch::stable::parallel_for(0, head.chunks(), head.grain(), [&](int64_t first, int64_t last) {
        HeadCall own = head.call;
        auto room = head.room();
        own.room = room.get();
        kernels().flow_head(own, first, last);
    });
    if (!partial.empty()) sum_logdets(affine);
}

void flow_head_backward(Optional grad_z, Optional grad_logdet, Tensor z, Tensor x, Tensor h, Tensor weight,
                        Optional bias, Optional norm, int64_t scale, double clip, bool shift, bool flip, int64_t logdet,
                        Tensor grad_x, Tensor grad_h, Tensor grad_weight, Optional grad_bias, Optional grad_norm) {
    Head head(x, h, weight, bias, norm, scale, clip, shift, flip, logdet, true);
    AffineCall& affine = head.call.affine;
    affine.saved_z = z.data_ptr(), affine.grad_z = data(grad_z), affine.grad_logdet = data(grad_logdet);
    affine.grad_x = grad_x.data_ptr();
    head.call.grad_h = data(grad_h);
    int64_t C = head.call.C, P = affine.P(), wide_C = padded(C), wide_P = padded(P), chunks = head.chunks();
    // Each slab sums its chunks in order, and the slabs are added in order, whatever the number of threads.
    int64_t slabs = std::clamp<int64_t>(chunks / TILES, 1, SLABS), size = P * wide_C + 2 * (wide_P + wide_C);
    std::vector<float> sums(slabs * size);
    int64_t grain = std::max<int64_t>(1, head.grain() * slabs / std::max<int64_t>(1, chunks));
    torch::stable::parallel_for(0, slabs, grain, [&](int64_t first, int64_t last) {
        HeadCall own = head.call;
        auto room = head.room();
        own.room = room.get();
        for (int64_t slab = first; slab < last; ++slab) {
            own.grad_weight = sums.data() + slab * size;
            own.grad_bias = own.grad_weight + P * wide_C;
            own.grad_norm = own.grad_bias + 2 * wide_P;
            kernels().flow_head_backward(own, chunks * slab / slabs, chunks * (slab + 1) / slabs);
        }
    });
    auto add_slabs = [&](int64_t from, int64_t lost, int64_t n, float* to) {
        for (int64_t i = from; i < from + n; ++i) {
            double total = 0;
            for (int64_t slab = 0; slab < slabs; ++slab)
                total += sums[slab * size + i] - (lost ? double(sums[slab * size + i + lost]) : 0);
            *to++ = float(total);
        }
    };
    torch::stable::parallel_for(0, P, SERIAL / (slabs * wide_C) + 1, [&](int64_t first, int64_t last) {
        for (int64_t p = first; p < last; ++p) add_slabs(p * wide_C, 0, C, data(grad_weight) + p * C);
    });
    if (grad_bias) add_slabs(P * wide_C, wide_P, P, data(grad_bias));
    if (grad_norm) add_slabs(P * wide_C + 2 * wide_P, wide_C, C, data(grad_norm));
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
