// Final norm, projection and affine transform, a tile of tokens at a time: the raw parameters stay in cache.
#include "affine_chunk.h"
#include "narrow.h"
#include "product.h"
#include "rows.h"

namespace starflow::STARFLOW_ISA {

namespace {

struct Tile {
    const HeadCall& call;
    Chunk chunk;
    int64_t C, P, wide_C, wide_P, source;  // source: first state of the tile
    // One row per token. packed: states over their root mean squares, for the gradient. products: states times weights.
    // params: raw parameters. roots: 1 / root mean square. means: factor of the state that the norm's gradient
    // subtracts.
    float *packed, *products, *params, *transposed, *roots, *means, *scratch;

    Tile(const HeadCall& call, int64_t index) : call(call), chunk(call.affine, index) {
        C = call.C, P = call.affine.P(), wide_C = padded(C), wide_P = padded(P);
        source = chunk.row * call.affine.T + chunk.first_source();
        int64_t rows = call.affine.chunk;
        packed = call.room;
        products = packed + rows * wide_C;
        params = products + rows * wide_P;
        transposed = params + rows * wide_P;
        roots = transposed + rows * P;
        means = roots + rows;
        scratch = means + rows;
    }

    const float* state(int64_t m) const { return call.h + (source + m) * C; }

    void project(Scratch& room) const {
        if (call.narrow())
            project_narrow();
        else
            project_wide();
        for (int64_t m = 0; m < chunk.tokens; ++m) {
            // An error of the root would affect all parameters of the token, hence double.
            double root = call.norm ? 1 / std::sqrt(double(roots[m]) / double(C) + RMS_NORM_EPS) : 1;
            roots[m] = float(root);
            for (int64_t p = 0; p < P; ++p)
                params[m * wide_P + p] = float(root * products[m * wide_P + p] + call.bias[p]);
        }
        chunk.gather(params, Format::float32, 0, wide_P, room);
    }

    // Like project_wide, leaves the sums of squares in `roots`.
    void project_narrow() const {
        for (int64_t m = 0; m < chunk.tokens; m += 2) {
            // An odd last row is its own partner.
            int rows = chunk.tokens - m < 2 ? 1 : 2;
            auto pair = narrow_product(state(m), (rows - 1) * C, call.across, C);
            for (int i = 0; i < rows; ++i) {
                roots[m + i] = pair.squares[i];
                memcpy(products + (m + i) * wide_P, pair.products[i], sizeof pair.products[i]);
            }
        }
    }

    void project_wide() const {
        for (int64_t m = 0; m < chunk.tokens && call.norm; ++m) roots[m] = sum_of_squares(state(m), int(C));
        Stream next(state(chunk.tokens), chunk.tokens * C, chunk.tokens, wide_P / LANES, C);
        product(
            state(0), C, chunk.tokens, call.weight, C, 0, wide_P / LANES, scratch,
            [&](int64_t m, int64_t tile, Vec v)
                __attribute__((always_inline)) { store(products + m * wide_P + tile * LANES, v); },
            &next);
    }

    // Computes the gradients of bias, weight and states from the gradients in `params`.
    void differentiate() const {
        for (int64_t m = 0; m < chunk.tokens; ++m) {
            float* gradients = params + m * wide_P;
            double inner = 0;
            for (int64_t p = P; p < wide_P; ++p) gradients[p] = 0;
            for (int64_t p = 0; p < wide_P; p += LANES) {
                LongSum both{load(call.grad_bias + p), load(call.grad_bias + wide_P + p)};
                both.add(load(gradients + p));
                store(call.grad_bias + p, both.sum);
                store(call.grad_bias + wide_P + p, both.lost);
            }
            for (int64_t p = 0; p < P; ++p) inner += double(gradients[p]) * products[m * wide_P + p];
            means[m] = float(double(roots[m]) * roots[m] * inner / double(C));
        }
        if (call.narrow())
            differentiate_narrow();
        else
            differentiate_wide();
        // The last state of a shifted sequence belongs to no token.
        if (chunk.identity >= 0) memset(call.grad_h + ((chunk.row + 1) * call.affine.T - 1) * C, 0, C * sizeof(float));
    }

    // Returns dL/dh for sixteen channels of a state, from the gradient of its products times the weight.
    INLINE Vec through_norm(int64_t m, Vec state, Vec gradient) const {
        return call.norm ? splat(roots[m]) * fma(-state, splat(means[m]), gradient) : gradient;
    }

    void differentiate_narrow() const {
        each(C, [&](int64_t c, int count) __attribute__((always_inline)) {
            for (int64_t first = 0; first < P; first += GRADIENT_OUTPUTS) {
                Vec weight[GRADIENT_OUTPUTS], dots[GRADIENT_OUTPUTS];
                UNROLL
                for (int p = 0; p < GRADIENT_OUTPUTS; ++p) {
                    weight[p] = load(call.across + c * NARROW + (first + p) * LANES);
                    dots[p] = splat(0.0f);
                }
                for (int64_t m = 0; m < chunk.tokens; ++m) {
                    float *to = call.grad_h + (source + m) * C + c, *gradients = params + m * wide_P + first;
                    Vec value = load(state(m) + c, count), unit = value * splat(roots[m]);
                    Vec total = first ? load(to, count) : splat(0.0f);
                    UNROLL
                    for (int p = 0; p < GRADIENT_OUTPUTS; ++p) {
                        Vec gradient = splat(gradients[p]);
                        total = fma(gradient, weight[p], total);
                        dots[p] = fma(gradient, unit, dots[p]);
                    }
                    store(to, first + GRADIENT_OUTPUTS < P ? total : through_norm(m, value, total), count);
                }
                UNROLL
                for (int p = 0; p < GRADIENT_OUTPUTS; ++p) {
                    float* to = call.grad_weight + (first + p) * wide_C + c;
                    store(to, load(to) + dots[p]);
                }
            }
        });
    }

    void differentiate_wide() const {
        int64_t n = chunk.tokens;
        for (int64_t m = 0; m < n; ++m) {
            for (int64_t p = 0; p < P; ++p) transposed[p * n + m] = params[m * wide_P + p];
            each(C, [&](int64_t c, int count) __attribute__((always_inline)) {
                store(packed + c * n + m * LANES, load(state(m) + c, count) * splat(roots[m]));
            });
        }
        product(transposed, n, P, packed, n, 0, wide_C / LANES, scratch,
                [&](int64_t p, int64_t tile, Vec v) __attribute__((always_inline)) {
                    float* sum = call.grad_weight + p * wide_C + tile * LANES;
                    store(sum, load(sum) + v);
                });
        product(params, wide_P, n, call.across, P, 0, wide_C / LANES, scratch,
                [&](int64_t m, int64_t tile, Vec v) __attribute__((always_inline)) {
                    int64_t c = tile * LANES;
                    int count = int(C - c);
                    Vec value = load(state(m) + c, count);
                    store(call.grad_h + (source + m) * C + c, through_norm(m, value, v), count);
                });
    }
};

}  // namespace

void flow_head(const HeadCall& call, int64_t first_chunk, int64_t last_chunk) {
    Scratch room;
    NothingAhead nothing;
    for (int64_t index = first_chunk; index < last_chunk; ++index) {
        Tile tile(call, index);
        tile.project(room);
        tile.chunk.density(index, room, nothing);
    }
}

void flow_head_backward(const HeadCall& call, int64_t first_chunk, int64_t last_chunk) {
    Scratch room;
    NothingAhead nothing;
    for (int64_t index = first_chunk; index < last_chunk; ++index) {
        Tile tile(call, index);
        tile.project(room);
        tile.chunk.gradient(room, nothing);
        tile.chunk.scatter(room, tile.params, Format::float32, 0, tile.wide_P);
        tile.differentiate();
    }
}

}  // namespace starflow::STARFLOW_ISA
