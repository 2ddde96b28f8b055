// The affine transform, density direction, and its gradient. A chunk of tokens has its parameters gathered, shift and
// order undone, into two rows a and b that run along with x; memory is read and written once.
#include "affine.h"

namespace starflow::STARFLOW_ISA {

namespace {

constexpr int64_t MOST = 8192;  // floats of a chunk: D <= MOST, see affine_flow/cpu.py

struct Chunk {
    const AffineCall& call;
    int64_t row, begin, tokens;  // tokens begin .. begin + tokens - 1 of sequence `row`

    Chunk(const AffineCall& call, int64_t index) : call(call) {
        row = index / call.chunks();
        begin = index % call.chunks() * call.chunk();
        tokens = call.T - begin < call.chunk() ? call.T - begin : call.chunk();
    }
    int64_t size() const { return tokens * call.D; }
    int64_t at() const { return (row * call.T + begin) * call.D; }
    // Which token's parameters transform token i of the chunk; -1: none.
    int64_t source(int64_t i) const {
        int64_t t = begin + i;
        return (call.flip ? call.T - 1 - t : t) - call.shift;
    }
    int64_t params_at(int64_t source) const { return (row * call.T + source) * call.P(); }
    bool unit() const { return call.affine.scale == Scale::unit; }

    void gather(float* a, float* b) const {
        int64_t D = call.D;
        for (int64_t i = 0; i < tokens; ++i) {
            int64_t s = source(i);
            if (s < 0) {
                memset(a + i * D, 0, D * sizeof *a);
                memset(b + i * D, 0, D * sizeof *b);
                continue;
            }
            const float* from = call.params + params_at(s);
            if (!unit()) memcpy(a + i * D, from, D * sizeof *a);
            memcpy(b + i * D, from + (unit() ? 0 : D), D * sizeof *b);
        }
        // Lanes past the end are computed and not used.
        for (int64_t i = size(); i % LANES; ++i) a[i] = b[i] = 0;
    }
};

struct Transform {
    Vec a, mu, sigma;
};

INLINE Transform transform(const float* a, const float* b, const Affine& affine) {
    Vec raw = soft_clip(load(a), affine.clip);
    return {raw, soft_clip(load(b), affine.clip), sigma_of(raw, affine.scale)};
}

}  // namespace

void affine_flow(const AffineCall& call, int64_t first_chunk, int64_t last_chunk) {
    alignas(64) float a[MOST] = {}, b[MOST];
    for (int64_t index = first_chunk; index < last_chunk; ++index) {
        Chunk chunk(call, index);
        chunk.gather(a, b);
        const float* x = call.x + chunk.at();
        Vec total = splat(0.0f);
        int64_t identity = -1;
        for (int64_t i = 0; i < chunk.tokens; ++i)
            if (chunk.source(i) < 0) identity = i * call.D;
        for (int64_t i = 0; i < chunk.size(); i += LANES) {
            int count = chunk.size() - i < LANES ? int(chunk.size() - i) : LANES;
            auto [raw, mu, sigma] = transform(a + i, b + i, call.affine);
            Vec l = log_sigma_of(raw, sigma, call.affine.scale);
            if (identity >= 0 && i < identity + call.D && i + LANES > identity) {
                Int none = first(int(identity + call.D - i)) & (splat(-1) - first(int(identity - i)));
                sigma = select(none, splat(1.0f), sigma);
                l = select(none, splat(0.0f), l);
            }
            if (count < LANES) l = select(first(count), l, splat(0.0f));
            store(call.z + chunk.at() + i, (load(x + i, count) - mu) / sigma, count);
            if (call.logdet == Logdet::none)
                store(call.logdets + chunk.at() + i, splat(0.0f) - l, count);
            else
                total = total + l;
        }
        if (call.logdet != Logdet::none) call.partial[index] = sum(total);
    }
}

void affine_flow_backward(const AffineCall& call, int64_t first_chunk, int64_t last_chunk) {
    alignas(64) float a[MOST] = {}, b[MOST];
    const Affine& affine = call.affine;
    for (int64_t index = first_chunk; index < last_chunk; ++index) {
        Chunk chunk(call, index);
        chunk.gather(a, b);
        float whole = 0;
        if (call.logdet != Logdet::none && call.grad_logdet)
            whole = call.grad_logdet[chunk.row] / (call.logdet == Logdet::mean ? float(call.T * call.D) : 1.0f);
        for (int64_t i = 0; i < chunk.size(); i += LANES) {
            int count = chunk.size() - i < LANES ? int(chunk.size() - i) : LANES;
            auto [raw, mu, sigma] = transform(a + i, b + i, affine);
            Vec grad_z = call.grad_z ? load(call.grad_z + chunk.at() + i, count) : splat(0.0f), grad_l = splat(whole);
            if (call.logdet == Logdet::none && call.grad_logdet) grad_l = load(call.grad_logdet + chunk.at() + i, count);
            Vec grad_x = grad_z / sigma, z = load(call.saved_z + chunk.at() + i, count);
            Vec grad_a = splat(0.0f) - fma(grad_z, z, grad_l) * log_sigma_slope(raw, sigma, affine.scale);
            Vec grad_b = splat(0.0f) - grad_x;
            if (affine.clip > 0) {
                Vec one = splat(1.0f), ra = raw / splat(affine.clip), rb = mu / splat(affine.clip);
                grad_a = grad_a * (one - ra * ra);
                grad_b = grad_b * (one - rb * rb);
            }
            store(a + i, grad_a);
            store(b + i, grad_b);
            store(call.grad_x + chunk.at() + i, grad_x, count);
        }
        int64_t D = call.D;
        for (int64_t i = 0; i < chunk.tokens; ++i) {
            int64_t s = chunk.source(i);
            if (s < 0) {  // the last parameters of the sequence belong to no token, and this token has none
                memcpy(call.grad_x + chunk.at() + i * D, call.grad_z ? call.grad_z + chunk.at() + i * D : b + i * D,
                       D * sizeof *b);
                memset(call.grad_params + chunk.params_at(call.T - 1), 0, call.P() * sizeof *b);
                continue;
            }
            float* to = call.grad_params + chunk.params_at(s);
            if (!chunk.unit()) memcpy(to, a + i * D, D * sizeof *a);
            memcpy(to + (chunk.unit() ? 0 : D), b + i * D, D * sizeof *b);
        }
    }
}

}  // namespace starflow::STARFLOW_ISA
