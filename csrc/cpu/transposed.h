// Memory of the solve of J^T u = g for a flow block, J the Jacobian of its density direction; see transposed.cpp.
#pragma once

#include "workspace.h"

namespace starflow {

// Slots whose attention weights are computed at once.
constexpr int64_t SOLVED_SLOTS = 16;

// Places of the values that the density pass keeps, in floats per slot: those of a layer, then the states after the
// last layer.
struct Kept {
    int64_t h, qkv, attn_branch, middle, up, gate, mlp_branch, layer, slot;

    explicit Kept(const Spec& spec) {
        int64_t end = 0;
        auto take = [&](int64_t width) {
            int64_t at = end;
            end += padded(width);
            return at;
        };
        h = take(spec.channels);
        qkv = take(spec.qkv_dim());
        attn_branch = take(spec.post_norm ? spec.channels : 0);
        middle = take(spec.channels);
        up = take(spec.mlp_dim);
        gate = take(spec.mlp == Mlp::swiglu ? spec.mlp_dim : 0);
        mlp_branch = take(spec.post_norm ? spec.channels : 0);
        layer = end;
        slot = spec.layers * layer + padded(spec.channels);
    }
};

// Gradients of one key head of a row and layer. Rows of a query are those of head j of its group at slot i of the
// block: j SOLVED_SLOTS + i.
struct HeadGradients {
    float *keys, *values;           // (T, d): sums over the queries of the blocks after the slot's
    float *weights, *grad_scores;   // (queries, L + T)
    float *queries, *grad_outputs;  // (queries, d)
    float* end;
    int64_t width, room;  // padded d and L + T

    HeadGradients(const Spec& spec, int64_t tokens, int64_t cached, float* from) {
        width = padded(spec.head_dim), room = padded(cached);
        auto take = [&](int64_t floats) {
            float* taken = from;
            from += floats;
            return taken;
        };
        int64_t rows = spec.heads / spec.kv_heads * SOLVED_SLOTS;
        keys = take(padded(tokens) * width), values = take(padded(tokens) * width);
        weights = take(rows * room), grad_scores = take(rows * room);
        queries = take(rows * width), grad_outputs = take(rows * width);
        end = from;
    }
};

// Returns the floats of one key head of a row and layer.
inline int64_t head_gradients_floats(const Spec& spec, int64_t tokens, int64_t cached) {
    float* start = nullptr;
    return HeadGradients(spec, tokens, cached, start).end - start;
}

// The members of Workspace hold gradients of what they are named after. `h` is that of normalized states, `normed` that
// of the states.
struct GradientSpace : Workspace {
    float *gate, *unnormed, *tile;  // gate: shared by the team

    GradientSpace(const Spec& spec, int64_t rows, int64_t cached, float* shared, float* own)
        : Workspace(spec, rows, cached, shared + rows * padded(spec.mlp_dim), own + rows * padded(spec.mlp_dim)),
          gate(shared),
          unnormed(end),
          tile(unnormed + rows * padded(spec.channels)) {
        end = tile + SOLVED_SLOTS * 64;
    }
};

// Returns the floats of workspace per thread.
inline int64_t gradient_floats(const Spec& spec, int64_t rows, int64_t cached) {
    float* start = nullptr;
    return GradientSpace(spec, rows, cached, start, start).end - start;
}

}  // namespace starflow
