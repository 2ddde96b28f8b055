// Attention ops, parallel over the key heads.
#include <cmath>

#include "../cpu/attention_sizes.h"
#include "bindings.h"

namespace starflow {

namespace {

// Below about this many operations, threads cost more than they save.
constexpr int64_t SERIAL = 1 << 17;

// Returns the heads of a tensor (B, T, H, d).
Heads heads(const AttentionCall& call, const Tensor& x, int64_t T, int64_t H) {
    STD_TORCH_CHECK(format(x) == call.format, "native kernels: a tensor is of the wrong dtype");
    check_strided(x, x.scalar_type(), {call.B, T, H, call.d});
    return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

// Return the heads of a tensor with the shape of the queries, or of the new keys.
Heads queries(const AttentionCall& call, const Tensor& x) { return heads(call, x, call.T, call.H); }
Heads keys_of(const AttentionCall& call, const Tensor& x) { return heads(call, x, call.T, call.H_kv); }

// Fills a call from the tensors. over: tensor with a slot per key that a query may see; cos and sin
// have as many rows.
AttentionCall attention_call(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& cos,
                             const Optional& sin, int64_t rotary, int64_t window, double temperature,
                             const Tensor& over) {
    AttentionCall call{};
    check_dims(q, 4), check_dims(k, 4), check_dims(over, 4);
    int64_t keys = over.size(1);
    call.B = q.size(0), call.T = q.size(1), call.H = int(q.size(2)), call.d = int(q.size(3));
    call.H_kv = int(k.size(2));
    call.window = window < keys ? window : 0;
    check_positive({call.T, call.H, call.H_kv, call.d});
    STD_TORCH_CHECK(call.H % call.H_kv == 0, "native kernels: key heads do not divide the heads");
    call.format = format(q), call.rotary = Rotary(rotary);
    STD_TORCH_CHECK(call.rotary == Rotary::none || (cos && sin), "native kernels: cos or sin is missing");
    call.scale = float(1 / (std::sqrt(double(call.d)) * temperature));
    call.cos = data(cos, keys * (call.d / 2)), call.sin = data(sin, keys * (call.d / 2));
    call.q = queries(call, q), call.k = keys_of(call, k), call.v = keys_of(call, v);
    return call;
}

// Runs `kernel` over all key heads, with `floats` floats of scratch per thread.
template <class Kernel>
void run_heads(const AttentionCall& call, int64_t keys, int64_t floats, Kernel kernel) {
    int64_t work = call.T * (call.H / call.H_kv) * (call.window ? call.window : keys) * call.d;
    parallel_for(call.B * call.H_kv, SERIAL / (work + 1) + 1, [&](int64_t first, int64_t last) {
        Floats scratch(floats, Floats::zeros);
        kernel(call, first, last, scratch.data());
    });
}

void cached_attention(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor lengths, Optional cos,
                      Optional sin, int64_t rotary, int64_t window, double temperature, Tensor out) {
    auto call = attention_call(q, k, v, cos, sin, rotary, window, temperature, k_cache);
    STD_TORCH_CHECK(call.format == Format::float32, "native kernels: a tensor is of the wrong dtype");
    call.S = k_cache.size(1), call.out = queries(call, out);
    call.k_cache = heads(call, k_cache, call.S, call.H_kv), call.v_cache = heads(call, v_cache, call.S, call.H_kv);
    call.lengths = static_cast<const int32_t*>(values(lengths, ScalarType::Int, call.B));
    for (int64_t row = 0; row < call.B; ++row)
        STD_TORCH_CHECK(call.lengths[row] >= 0 && call.lengths[row] + call.T <= call.S, "lengths do not fit the cache");
    run_heads(call, call.S, cached_floats(call), kernels().cached_attention);
}

void causal_attention(Tensor q, Tensor k, Tensor v, Optional cos, Optional sin, int64_t rotary, int64_t window,
                      double temperature, Tensor out, Tensor lse) {
    auto call = attention_call(q, k, v, cos, sin, rotary, window, temperature, q);
    call.out = queries(call, out), call.lse = data(lse, call.B * call.H * call.T);
    run_heads(call, call.T, causal_floats(call, false), kernels().causal_attention);
}

void causal_attention_backward(Optional grad_out, Optional grad_lse, Tensor lse, Tensor q, Tensor k, Tensor v,
                               Optional cos, Optional sin, int64_t rotary, int64_t window, double temperature,
                               Tensor grad_q, Tensor grad_k, Tensor grad_v) {
    auto call = attention_call(q, k, v, cos, sin, rotary, window, temperature, q);
    call.lse = data(lse, call.B * call.H * call.T), call.grad_lse = data(grad_lse, call.B * call.H * call.T);
    if (grad_out) call.grad_out = queries(call, *grad_out);
    call.grad_q = queries(call, grad_q), call.grad_k = keys_of(call, grad_k), call.grad_v = keys_of(call, grad_v);
    run_heads(call, call.T, causal_floats(call, true), kernels().causal_attention_backward);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(starflow_native, m) {
    m.def(
        "cached_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor lengths, "
        "Tensor? cos, Tensor? sin, int rotary, int window, float temperature, Tensor(c!) out) -> ()");
    m.def(
        "causal_attention(Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, int rotary, int window, "
        "float temperature, Tensor(a!) out, Tensor(b!) lse) -> ()");
    m.def(
        "causal_attention_backward(Tensor? grad_out, Tensor? grad_lse, Tensor lse, Tensor q, Tensor k, Tensor v, "
        "Tensor? cos, Tensor? sin, int rotary, int window, float temperature, Tensor(a!) grad_q, "
        "Tensor(b!) grad_k, Tensor(c!) grad_v) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(starflow_native, CPU, m) {
    m.impl("cached_attention", TORCH_BOX(&cached_attention));
    m.impl("causal_attention", TORCH_BOX(&causal_attention));
    m.impl("causal_attention_backward", TORCH_BOX(&causal_attention_backward));
}

}  // namespace starflow
