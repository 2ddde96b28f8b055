// Ops of a whole transformer layer in training.
#include "linear.h"

#include <cmath>

#include "../cpu/attention_sizes.h"

namespace starflow {

namespace {

// TOKENS: tokens that pass through the layer together, so that what is between its parts stays in cache. SLABS: most parts
// of a sum over tokens. SERIAL: below about this many multiply-adds, threads cost more than they save.
constexpr int64_t TOKENS = 1024, SLABS = 16, SERIAL = 1 << 20;
enum Weights { ATTN_NORM, QKV = 2, PROJ = 4, MLP_NORM = 6, UP = 8, DOWN = 10, WEIGHTS = 12 };

// Returns a padded copy of n values plus `plus`, or zeros.
Floats vector_of(const Optional& given, int64_t n, float plus) {
    Floats to(padded(n), Floats::zeros);
    if (const float* from = data(given, n))
        for (int64_t i = 0; i < n; ++i) to.data()[i] = from[i] + plus;
    return to;
}

// A call whose outputs are not set yet, and the weights that it points to.
struct Layer {
    LayerCall call{};
    AttentionCall attention{};
    int64_t B, T, C, F, Q, A;
    std::vector<Floats> kept;

    Layer(const Tensor& h, const std::vector<Optional>& weights, const Optional& cos, const Optional& sin,
          const Optional& drop_attention, const Optional& drop_mlp, std::vector<int64_t> options, const Tensor& qkv,
          const Tensor& attended, const Tensor& lse, const Tensor& mid, const Tensor& pre) {
        check_dims(h, 3), check_dims(pre, 3);
        STD_TORCH_CHECK(options.size() == 5 && weights.size() == WEIGHTS, "native kernels: a layer is incomplete");
        B = h.size(0), T = h.size(1), C = h.size(2), F = pre.size(2);
        int64_t H = options[0], H_kv = options[1], d = options[2];
        check_positive({B, T, C, F, H, H_kv, d});
        STD_TORCH_CHECK(H % H_kv == 0, "native kernels: key heads do not divide the heads");
        Q = (H + 2 * H_kv) * d, A = H * d;
        int64_t M = B * T;
        call.norm = Norm(options[3]);
        call.h = data(h);
        call.drop_attention = data(drop_attention, M * C), call.drop_mlp = data(drop_mlp, M * C);
        call.qkv_values = data(qkv, M * Q), call.attended = data(attended, M * A);
        call.mid = data(mid, M * C), call.pre = data(pre, M * F);
        call.attn_norm = norm(weights, ATTN_NORM), call.mlp_norm = norm(weights, MLP_NORM);
        attention.B = B, attention.T = T, attention.H = int(H), attention.H_kv = int(H_kv), attention.d = int(d);
        attention.scale = float(1 / std::sqrt(double(d))), attention.rotary = Rotary(options[4]);
        STD_TORCH_CHECK(attention.rotary == Rotary::none || (cos && sin), "native kernels: cos or sin is missing");
        attention.cos = data(cos, T * (d / 2)), attention.sin = data(sin, T * (d / 2));
        attention.q = of_tokens(call.qkv_values, Q), attention.k = of_tokens(call.qkv_values + A, Q);
        attention.v = of_tokens(call.qkv_values + A + H_kv * d, Q);
        attention.out = of_tokens(call.attended, A);
        attention.lse = data(lse, B * H * T);
    }

    // Returns the heads of rows of `width` values.
    Heads of_tokens(float* values, int64_t width) const { return {values, T * width, width, attention.d}; }

    const float* keep(Floats values) {
        kept.push_back(std::move(values));
        return kept.back().data();
    }

    NormWeights norm(const std::vector<Optional>& weights, int at) {
        if (call.norm == Norm::none) return {};
        float plus = call.norm == Norm::rms_norm ? 1.0f : 0.0f;
        return {keep(vector_of(weights[at], C, plus)), keep(vector_of(weights[at + 1], C, 0))};
    }

    // Returns the product with weight (out, in) and its bias, or with the transposed weight if `across`.
    Linear linear(const std::vector<Optional>& weights, int at, int64_t out, int64_t in, bool across) {
        const float *weight = data(weights[at], out * in), *bias = data(weights[at + 1], out);
        if (bias) bias = across ? nullptr : keep(vector_of(weights[at + 1], out, 0));
        STD_TORCH_CHECK(weight, "native kernels: a weight is missing");
        if (across) std::swap(out, in);
        Floats packed(padded(out) * in, Floats::anything);
        LinearCall packing{0, out, in, nullptr, weight, across, packed.data()};
        pack(packing);
        return {keep(std::move(packed)), bias, int(in), int(out)};
    }

    void read(const std::vector<Optional>& weights, bool across) {
        call.qkv = linear(weights, QKV, Q, C, across), call.proj = linear(weights, PROJ, C, A, across);
        call.up = linear(weights, UP, F, C, across), call.down = linear(weights, DOWN, C, F, across);
    }

    // Calls run(first sequence, last sequence) for the sequences that pass through the layer together.
    template <class Run>
    void over_sequences(Run run) const {
        int64_t step = std::max<int64_t>(1, TOKENS / T);
        for (int64_t b = 0; b < B; b += step) run(b, std::min(B, b + step));
    }

    // Calls run(first row, last row, scratch) for the tokens of some sequences.
    template <class Run>
    void over_rows(int64_t first, int64_t last, Run run) const {
        int64_t begin = first * T, end = last * T, grain = SERIAL / (LAYER_ROWS * C * (F + Q)) + 1;
        parallel_for(parts(end - begin, LAYER_ROWS), grain, [&](int64_t from, int64_t to) {
            Floats scratch(call.floats(), Floats::anything);
            for (int64_t m = begin + from * LAYER_ROWS; m < std::min(end, begin + to * LAYER_ROWS); m += LAYER_ROWS)
                run(m, std::min(end, m + LAYER_ROWS), scratch.data());
        });
    }

    template <class Kernel>
    void over_heads(int64_t first, int64_t last, bool gradient, Kernel kernel) const {
        int64_t H_kv = attention.H_kv, work = T * T * attention.d * (attention.H / H_kv);
        parallel_for((last - first) * H_kv, SERIAL / 8 / (work + 1) + 1, [&](int64_t from, int64_t to) {
            Floats scratch(causal_floats(attention, gradient), Floats::zeros);
            kernel(attention, first * H_kv + from, first * H_kv + to, scratch.data());
        });
    }
};

void block_layer(Tensor h, std::vector<Optional> weights, Optional cos, Optional sin, Optional drop_attention,
                 Optional drop_mlp, std::vector<int64_t> options, Tensor qkv, Tensor attended, Tensor lse, Tensor mid,
                 Tensor pre, Tensor out) {
    Layer layer(h, weights, cos, sin, drop_attention, drop_mlp, options, qkv, attended, lse, mid, pre);
    layer.read(weights, false);
    layer.call.out = data(out, layer.B * layer.T * layer.C);
    layer.over_sequences([&](int64_t first, int64_t last) {
        auto rows = [&](auto kernel) {
            layer.over_rows(first, last,
                            [&](int64_t from, int64_t to, float* scratch) { kernel(layer.call, from, to, scratch); });
        };
        rows(kernels().layer_enter);
        layer.over_heads(first, last, false, kernels().causal_attention);
        rows(kernels().layer_leave);
    });
}

void block_layer_backward(Tensor grad, Tensor h, std::vector<Optional> weights, Optional cos, Optional sin,
                          Optional drop_attention, Optional drop_mlp, std::vector<int64_t> options, Tensor qkv,
                          Tensor attended, Tensor lse, Tensor mid, Tensor pre, Tensor grad_h,
                          std::vector<Optional> gradients) {
    Layer layer(h, weights, cos, sin, drop_attention, drop_mlp, options, qkv, attended, lse, mid, pre);
    layer.read(weights, true);
    STD_TORCH_CHECK(gradients.size() == WEIGHTS, "native kernels: a layer is incomplete");
    int64_t B = layer.B, T = layer.T, C = layer.C, F = layer.F, Q = layer.Q, A = layer.A;
    int64_t most = std::min(B, std::max<int64_t>(1, TOKENS / T)) * T;
    bool normed = layer.call.norm != Norm::none;
    Floats room(most * (2 * padded(F) + padded(Q) + padded(A) + 5 * padded(C)), Floats::anything);
    int64_t slabs = std::min(parts(most, LAYER_ROWS), SLABS), width = 4 * padded(C);
    Floats totals(slabs * width, Floats::zeros);
    const float *grads = data(grad, B * T * C), *states = layer.call.h;
    float* to = data(grad_h, B * T * C);
    auto weight_gradient_of = [&](int at, const float* x, const float* grad, int64_t rows, int64_t in, int64_t out,
                                  bool add) {
        LinearCall call{rows, out, in, x};
        call.y = const_cast<float*>(grad);
        call.grad_weight = data(gradients[at], out * in), call.grad_bias = data(gradients[at + 1], out), call.add = add;
        STD_TORCH_CHECK(call.grad_weight, "native kernels: a gradient is missing");
        weight_gradient(call);
    };
    layer.over_sequences([&](int64_t first, int64_t last) {
        // Row 0 of the temporary values belongs to the first token of these sequences.
        int64_t offset = first * T, rows = (last - first) * T;
        float* from = room.data();
        auto take = [&](int64_t values) {
            float* taken = from - offset * values;
            from += most * padded(values);
            return taken;
        };
        LayerCall& call = layer.call;
        call.grad_out = grads, call.grad_h = to;
        call.hidden = take(F), call.grad_pre = take(F), call.grad_qkv = take(Q), call.grad_attended = take(A);
        call.grad_mid = take(C), call.normed = take(C), call.normed_mid = take(C);
        call.branch_attention = take(C), call.branch_mlp = take(C);
        if (!call.drop_attention) call.branch_attention = call.grad_mid;
        if (!call.drop_mlp) call.branch_mlp = const_cast<float*>(grads);
        AttentionCall& attention = layer.attention;
        attention.grad_out = layer.of_tokens(call.grad_attended, A);
        attention.grad_q = layer.of_tokens(call.grad_qkv, Q), attention.grad_k = layer.of_tokens(call.grad_qkv + A, Q);
        attention.grad_v = layer.of_tokens(call.grad_qkv + A + attention.H_kv * attention.d, Q);
        // Each slab sums its rows in order, and the slabs are added in order, whatever the number of threads.
        auto run = [&](auto kernel, int64_t place) {
            int64_t count = parts(rows, LAYER_ROWS), grain = SERIAL * slabs / (rows * C * (F + Q)) + 1;
            parallel_for(slabs, grain, [&](int64_t begin, int64_t end) {
                Floats scratch(call.floats(), Floats::anything);
                for (int64_t slab = begin; slab < end; ++slab)
                    for (int64_t part = count * slab / slabs; part < count * (slab + 1) / slabs; ++part)
                        kernel(call, offset + part * LAYER_ROWS, offset + std::min(rows, (part + 1) * LAYER_ROWS),
                               scratch.data(), totals.data() + slab * width + place);
            });
        };
        run(kernels().layer_leave_backward, 2 * padded(C));
        layer.over_heads(first, last, true, kernels().causal_attention_backward);
        run(kernels().layer_enter_backward, 0);
        weight_gradient_of(DOWN, call.hidden + offset * F, call.branch_mlp + offset * C, rows, F, C, first);
        const float* mid_norm = normed ? call.normed_mid : call.mid;
        weight_gradient_of(UP, mid_norm + offset * C, call.grad_pre + offset * F, rows, C, F, first);
        weight_gradient_of(PROJ, call.attended + offset * A, call.branch_attention + offset * C, rows, A, C, first);
        const float* norm = normed ? call.normed : states;
        weight_gradient_of(QKV, norm + offset * C, call.grad_qkv + offset * Q, rows, C, Q, first);
    });
    for (int part = 0; part < 4; ++part) {
        float* sums = data(gradients[(part / 2 ? MLP_NORM : ATTN_NORM) + part % 2], C);
        for (int64_t c = 0; sums && c < C; ++c) {
            double total = 0;
            for (int64_t slab = 0; slab < slabs; ++slab) total += totals.data()[slab * width + part * padded(C) + c];
            sums[c] = float(total);
        }
    }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(starflow_native, m) {
    m.def(
        "block_layer(Tensor h, Tensor?[] weights, Tensor? cos, Tensor? sin, Tensor? drop_attention, Tensor? drop_mlp, "
        "int[] options, Tensor(a!) qkv, Tensor(b!) attended, Tensor(c!) lse, Tensor(d!) mid, Tensor(e!) pre, "
        "Tensor(f!) out) -> ()");
    m.def(
        "block_layer_backward(Tensor grad, Tensor h, Tensor?[] weights, Tensor? cos, Tensor? sin, Tensor? "
        "drop_attention, "
        "Tensor? drop_mlp, int[] options, Tensor qkv, Tensor attended, Tensor lse, Tensor mid, Tensor pre, "
        "Tensor(a!) grad_h, Tensor(b!)?[] gradients) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(starflow_native, CPU, m) {
    m.impl("block_layer", TORCH_BOX(&block_layer));
    m.impl("block_layer_backward", TORCH_BOX(&block_layer_backward));
}

}  // namespace starflow
