// Final norm, projection and affine transform, a tile of tokens at a time: the raw parameters stay in cache.
#include "affine_chunk.h"
#include "product.h"
#include "rows.h"

namespace starflow::STARFLOW_ISA {

namespace {

INLINE void add(float* sum, float* lost, Vec value) {
    LongSum both{load(sum), load(lost)};
    both.add(value);
    store(sum, both.sum);
    store(lost, both.lost);
}

struct Tile {
    const HeadCall& call;
    Chunk chunk;
    int64_t C, P, wide_C, wide_P, source;  // source: first state of the tile
    float *normed, *params, *scratch, *packed, *grad_y, *transposed;

    Tile(const HeadCall& call, int64_t index) : call(call), chunk(call.affine, index) {
        C = call.C, P = call.affine.P(), wide_C = padded(C), wide_P = padded(P);
        source = chunk.row * call.affine.T + chunk.first_source();
        int64_t rows = call.affine.chunk;
        normed = call.room;
        params = normed + rows * wide_C;
        scratch = params + rows * wide_P;
        packed = scratch + (rows > P ? rows : P) * SCRATCH_COLUMNS;
        grad_y = packed + rows * wide_C;
        transposed = grad_y + rows * wide_C;
    }

    const float* state(int64_t m) const { return call.h + (source + m) * C; }
    const float* input() const { return call.norm ? normed : state(0); }
    int64_t input_stride() const { return call.norm ? wide_C : C; }

    void project(Scratch& room) const {
        if (call.norm)
            for (int64_t m = 0; m < chunk.tokens; ++m) rms_norm(state(m), call.norm, int(C), normed + m * wide_C);
        product(input(), input_stride(), chunk.tokens, call.weight, C, 0, wide_P / LANES, scratch,
                [&](int64_t m, int64_t tile, Vec v) __attribute__((always_inline)) {
                    store(params + m * wide_P + tile * LANES, v + load(call.bias + tile * LANES));
                });
        chunk.gather(params, Format::float32, 0, wide_P, room);
    }

    // grad_weight += G^T y and grad_bias += sum of G, with G = `params` by now.
    void add_weight_gradient() const {
        int64_t n = chunk.tokens;
        for (int64_t m = 0; m < n; ++m) {
            for (int64_t p = 0; p < wide_P; p += LANES)
                add(call.grad_bias + p, call.grad_bias + wide_P + p, load(params + m * wide_P + p));
            for (int64_t p = 0; p < P; ++p) transposed[p * n + m] = params[m * wide_P + p];
            for (int64_t c = 0; c < C; c += LANES)
                store(packed + (c * n + m * LANES), load(input() + m * input_stride() + c, int(C - c)));
        }
        product(transposed, n, P, packed, n, 0, wide_C / LANES, scratch,
                [&](int64_t p, int64_t tile, Vec v) __attribute__((always_inline)) {
                    float* sum = call.grad_weight + p * wide_C + tile * LANES;
                    store(sum, load(sum) + v);
                });
    }

    // grad_h of one state from dL/dy, and what it adds to grad_norm.
    void through_norm(const float* h, const float* grad, float* grad_h) const {
        Vec square = splat(0.0f), inner = splat(0.0f), one = splat(1.0f);
        each(C, [&](int64_t c, int count) __attribute__((always_inline)) {
            Vec value = load(h + c, count);
            square = fma(value, value, square);
            inner = fma(load(grad + c, count) * (one + load(call.norm + c, count)), value, inner);
        });
        float r = inverse_root(sum(square) / float(C) + RMS_NORM_EPS);
        Vec scale = splat(r), mean = splat(r * r * r * (sum(inner) / float(C)));
        each(C, [&](int64_t c, int count) __attribute__((always_inline)) {
            Vec value = load(h + c, count), g = load(grad + c, count);
            add(call.grad_norm + c, call.grad_norm + wide_C + c, g * value * scale);
            store(grad_h + c, fma(-value, mean, scale * g * (one + load(call.norm + c, count))), count);
        });
    }

    void add_state_gradient() const {
        float* grad_h = call.grad_h + source * C;
        product(params, wide_P, chunk.tokens, call.transposed, P, 0, wide_C / LANES, scratch,
                [&](int64_t m, int64_t tile, Vec v) __attribute__((always_inline)) {
                    if (call.norm)
                        store(grad_y + m * wide_C + tile * LANES, v);
                    else
                        store(grad_h + m * C + tile * LANES, v, int(C - tile * LANES));
                });
        if (call.norm)
            for (int64_t m = 0; m < chunk.tokens; ++m) through_norm(state(m), grad_y + m * wide_C, grad_h + m * C);
        // The last state of a shifted sequence has no token.
        if (chunk.identity >= 0) memset(call.grad_h + ((chunk.row + 1) * call.affine.T - 1) * C, 0, C * sizeof(float));
    }
};

}  // namespace

void flow_head(const HeadCall& call, int64_t first_chunk, int64_t last_chunk) {
    Scratch room;
    for (int64_t index = first_chunk; index < last_chunk; ++index) {
        Tile tile(call, index);
        tile.project(room);
        tile.chunk.density(index, room);
    }
}

void flow_head_backward(const HeadCall& call, int64_t first_chunk, int64_t last_chunk) {
    Scratch room;
    for (int64_t index = first_chunk; index < last_chunk; ++index) {
        Tile tile(call, index);
        tile.project(room);
        tile.chunk.gradient(room);
        tile.chunk.scatter(room, tile.params, Format::float32, 0, tile.wide_P);
        for (int64_t m = 0; m < tile.chunk.tokens; ++m)
            for (int64_t p = tile.P; p < tile.wide_P; ++p) tile.params[m * tile.wide_P + p] = 0;
        tile.add_weight_gradient();
        tile.add_state_gradient();
    }
}

}  // namespace starflow::STARFLOW_ISA
