// Solve of J^T u = g, J the Jacobian of a flow block in the density direction: the counterpart of sampling, from the
// last slot to the first. A density pass has kept what the gradient of each slot needs. The gradient of a token is known
// once all later slots have sent theirs, to its embedding and through its keys and values; this gives u of the token,
// and that the gradient of the slot that determines it.
//
// The weights of a block of slots are computed at once, since queries are known. Gradients of keys and values are
// gathered by the slots of the block themselves, and sent to the slots before the block at once.
#include <algorithm>

#include "norm_gradients.h"
#include "pass.h"
#include "tiles.h"

namespace starflow::STARFLOW_ISA {

namespace {

// Last slots of a pass, and the density pass that kept the values of a slot.
struct Slots {
    const BlockCall& call;

    // Slots that determine a token.
    int64_t all() const { return call.block->spec.start ? call.T : call.T - 1; }
    int64_t block(int64_t slot) const { return slot / SOLVED_SLOTS * SOLVED_SLOTS; }
    int64_t block_end(int64_t slot) const { return std::min(block(slot) + SOLVED_SLOTS, all()); }
    int64_t pass(int64_t slot) const { return slot / call.chunk * call.chunk; }
    int64_t pass_size(int64_t slot) const { return std::min(call.chunk, all() - pass(slot)); }
};

// The gradient of one slot, for all sequences of a group.
struct Step {
    const Pass& pass;
    GradientSpace& ws;
    const Spec& spec = pass.spec;
    const BlockCall& call = pass.call;
    const Transposed& solve = *call.transposed;
    Team& team = pass.team;
    Slots slots{call};
    int64_t C = padded(spec.channels), slot = pass.slot, rows = pass.sequences;

    // Rows of a kept value of one slot.
    struct Rows {
        const float* first;
        int64_t stride;
        const float* operator[](int64_t r) const { return first + r * stride; }
    };
    Rows kept(int64_t layer, int64_t Kept::* place, int64_t width, int64_t at) const {
        Pass keeping = pass;
        keeping.slot = slots.pass(at), keeping.n = slots.pass_size(at);
        return {keeping.kept(layer, place) + (at - keeping.slot) * padded(width), keeping.n * padded(width)};
    }
    Rows kept(int64_t layer, int64_t Kept::* place, int64_t width) const { return kept(layer, place, width, slot); }

    HeadGradients head_gradients(int64_t r, int64_t layer, int64_t head) const {
        int64_t index = (pass.global_row(r) * spec.layers + layer) * spec.kv_heads + head, cached = call.L + call.T;
        return {spec, call.T, cached, solve.heads + index * head_gradients_floats(spec, call.T, cached)};
    }

    // Calls each(r, head) for the key heads of this thread, the same ones in every step.
    template <class Each>
    void heads(Each each) const {
        for (int64_t item = team.rank; item < rows * spec.kv_heads; item += team.size)
            each(item / spec.kv_heads, int(item % spec.kv_heads));
    }

    int group() const { return spec.heads / spec.kv_heads; }
    bool given(int64_t r) const { return call.known && pass.target() < call.known[pass.first_sequence + r]; }

    // Computes u of the token that the slot determines, and the gradients of its raw parameters.
    void solve_token(int64_t r) const {
        int64_t t = pass.target(), D = spec.token_dim, P = spec.params_dim();
        const float *x = pass.at(call.input, r, t), *g = pass.at(solve.g, r, t), *later = pass.at(solve.u, r, t);
        const float* params = call.params + ((pass.first_sequence + r) * call.T + slot) * P;
        float *u = ws.fresh + r * padded(D), *grads = ws.outputs + r * padded(P), clip = spec.affine.clip;
        Vec zero = splat(0.0f), one = splat(1.0f), inverse = splat(clip > 0 ? 1 / clip : 0.0f);
        auto through_clip = [&](Vec grad, Vec clipped) __attribute__((always_inline)) {
            Vec tanh = clipped * inverse;
            return grad * fma(-tanh, tanh, one);
        };
        for (int64_t i = 0; i < D; i += LANES) {
            int count = int(D - i);
            Raw raw = raw_at(params, int(i), int(D), spec.affine);
            // This is u / sigma. Where it is zero, the token contributes nothing, even if its parameters are infinite.
            Vec left = load(g + i, count) - load(later + i, count), sigma = sigma_of(raw.a, spec.affine.scale);
            Int counts = abs(left) > zero;
            store(u + i, given(r) ? left : select(counts, sigma * left, left), count);
            if (given(r)) counts = zero < zero;
            // Zero, or NaN, which must reach the earlier tokens.
            Vec idle = given(r) ? zero : left;
            store(grads + P - D + i, select(counts, through_clip(-left, raw.b), idle), count);
            if (spec.affine.scale == Scale::unit) continue;
            Vec slope = one;
            if (spec.affine.scale == Scale::softplus) {
                Vec power = softplus_power(raw.a);
                slope = select(raw.a < splat(SOFTPLUS_SMALL), one, power / ((one + power) * sigma));
            }
            Vec grad = through_clip(left * (raw.b - load(x + i, count)) * slope, raw.a);
            store(grads + i, select(counts, grad, idle), count);
        }
    }

    void write_token() const {
        int64_t D = spec.token_dim;
        for (int64_t r = team.begin(rows); r < team.end(rows); ++r)
            memcpy(pass.at(solve.u, r, pass.target()), ws.fresh + r * padded(D), D * sizeof(float));
    }

    // Every thread computes the gradient of the states for itself, which saves barriers.
    void head() const {
        pass.multiply(solve.proj_out, ws.outputs, [&](int64_t m, int64_t c, Vec v) { store(ws.h + m * C + c, v); });
        team.wait();
        write_token();
        Rows states = kept(spec.layers, &Kept::h, spec.channels);
        for (int64_t r = 0; r < rows; ++r) {
            if (spec.final_norm)
                rms_norm_gradient(states[r], call.block->final_norm, ws.h + r * C, spec.channels, ws.normed + r * C,
                                  false);
            else
                memcpy(ws.normed + r * C, ws.h + r * C, C * sizeof(float));
        }
    }

    // Returns the gradient of what a branch computes before its norm.
    const float* branch(int64_t layer, int64_t Kept::* place, const float* post_norm) const {
        if (!spec.post_norm) return ws.normed;
        Rows outputs = kept(layer, place, spec.channels);
        for (int64_t r = 0; r < rows; ++r)
            rms_norm_gradient(outputs[r], post_norm, ws.normed + r * C, spec.channels, ws.unnormed + r * C, false);
        return ws.unnormed;
    }

    void add_through_norm(const NormWeights& norm, Rows states) const {
        for (int64_t r = 0; r < rows; ++r) {
            float *grad = ws.h + r * C, *to = ws.normed + r * C;
            if (spec.norm == Norm::layer_norm)
                layer_norm_gradient(states[r], norm.weight, grad, spec.channels, to);
            else if (spec.norm == Norm::rms_norm)
                rms_norm_gradient(states[r], norm.weight, grad, spec.channels, to, true);
            else
                for (int64_t c = 0; c < C; c += LANES) store(to + c, load(to + c) + load(grad + c));
        }
    }

    void feed_forward(int64_t index) const {
        const Layer& layer = call.block->layers[index];
        const Transposed::Layer& back = solve.layers[index];
        int64_t width = padded(spec.mlp_dim);
        const float* grad = branch(index, &Kept::mlp_branch, layer.mlp_post_norm);
        Rows ups = kept(index, &Kept::up, spec.mlp_dim), gates = kept(index, &Kept::gate, spec.mlp_dim);
        bool gated = spec.mlp == Mlp::swiglu;
        pass.multiply(back.down, grad, [&](int64_t m, int64_t c, Vec v) __attribute__((always_inline)) {
            Vec up = load(ups[m] + c);
            if (gated) {
                Vec gate = load(gates[m] + c);
                store(ws.gate + m * width + c, v * up * gelu_tanh_gradient(gate));
                store(ws.hidden + m * width + c, v * gelu_tanh(gate));
            } else {
                store(ws.hidden + m * width + c, v * gelu_gradient(up));
            }
        });
        team.wait();
        pass.multiply(back.up, ws.hidden, [&](int64_t m, int64_t c, Vec v) { store(ws.h + m * C + c, v); });
        if (gated)
            pass.multiply(back.gate, ws.gate,
                          [&](int64_t m, int64_t c, Vec v) { store(ws.h + m * C + c, load(ws.h + m * C + c) + v); });
        team.wait();
        add_through_norm(layer.mlp_norm, kept(index, &Kept::middle, spec.channels));
    }

    // Computes the attention weights of the slots of a block, whose last one this is.
    void weigh_block(int64_t index) const {
        int64_t begin = slots.block(slot), count = slot + 1 - begin, d = spec.head_dim, keys = call.L + slot + 1;
        heads([&](int64_t r, int head) {
            HeadGradients own = head_gradients(r, index, head);
            for (int j = 0; j < group(); ++j) {
                float* queries = own.queries + j * SOLVED_SLOTS * own.width;
                float* weights = own.weights + j * SOLVED_SLOTS * own.room;
                for (int64_t i = 0; i < count; ++i) {
                    const float* raw = kept(index, &Kept::qkv, spec.qkv_dim(), begin + i)[r];
                    float* q = queries + i * own.width;
                    memset(q, 0, own.width * sizeof(float));
                    memcpy(q, raw + (head * group() + j) * d, d * sizeof(float));
                    pass.prepare(q, call.block->layers[index].q_norm, call.L + begin + i);
                }
                product_tiles(queries, own.width, count, pass.cached(r, index, head).keys, d * LANES, d,
                              int(padded(keys) / LANES), weights, own.room);
                for (int64_t i = 0; i < count; ++i) {
                    int64_t seen = call.L + begin + i + 1;
                    float* row = weights + i * own.room;
                    Vec whole = splat(1.0f / softmax(row, seen, pass.attention_scale(r)));
                    for (int64_t s = 0; s < seen; s += LANES) store(row + s, load(row + s) * whole);
                }
            }
        });
    }

    // Sends the gradients of keys and values from the queries of a block, whose first slot this is, to earlier slots.
    void send_block(int64_t index) const {
        int64_t end = slots.block_end(slot), count = end - slot;
        auto send = [&](const float* weights, const float* rows, const HeadGradients& own, float* to, bool add) {
            for (int64_t s = 0; s < slot; s += BLOCK) {
                int64_t width = std::min(BLOCK, slot - s);
                for (int64_t i = 0; i < count; ++i)
                    memcpy(ws.tile + i * BLOCK, weights + i * own.room + call.L + s, width * sizeof(float));
                for (int64_t m = 0; m < width; m += LANES)
                    multiply<true>(ws.tile + m, rows, own.width, count, own.width / LANES, to + (s + m) * own.width,
                                   own.width, add);
            }
        };
        heads([&](int64_t r, int head) {
            HeadGradients own = head_gradients(r, index, head);
            for (int j = 0; j < group(); ++j) {
                int64_t weights = j * SOLVED_SLOTS * own.room, rows = j * SOLVED_SLOTS * own.width;
                bool add = end < slots.all() || j;
                send(own.weights + weights, own.grad_outputs + rows, own, own.values, add);
                send(own.grad_scores + weights, own.queries + rows, own, own.keys, add);
            }
        });
    }

    // Computes the gradients of the scores and of the queries, up to MOST_QUERIES at a time.
    void differentiate_queries(int64_t index) const {
        int d = spec.head_dim, waiting = 0;
        int64_t ldq = padded(spec.qkv_dim()), ldo = padded(int64_t(spec.heads) * d), keys = call.L + slot + 1;
        int64_t room = padded(call.L + call.T), width = padded(d), i = slot - slots.block(slot);
        const float *x[MOST_QUERIES], *w[MOST_QUERIES], *weights[MOST_QUERIES], *exchanged[MOST_QUERIES];
        float *y[MOST_QUERIES], *scores[MOST_QUERIES], *to[MOST_QUERIES];
        auto differentiate = [&] {
            product_each(waiting, x, w, d * LANES, d, int(padded(keys) / LANES), scores);
            for (int k = 0; k < waiting; ++k) {
                Vec inner = splat(0.0f), scale = splat(pass.attention_scale(0));
                vectors(int(keys), [&](int s, int count) __attribute__((always_inline)) {
                    inner = fma(load(weights[k] + s), used(load(scores[k] + s), count), inner);
                });
                Vec mean = splat(sum(inner));
                vectors(int(keys), [&](int s, int count) __attribute__((always_inline)) {
                    Vec grad = load(weights[k] + s) * (load(scores[k] + s) - mean) * scale;
                    store(scores[k] + s, used(grad, count));
                });
                y[k] = ws.sums + k * width;
            }
            product_each(waiting, scores, exchanged, room * LANES, keys, int(width / LANES), y);
            for (int k = 0; k < waiting; ++k) memcpy(to[k], y[k], d * sizeof(float));
            waiting = 0;
        };
        heads([&](int64_t r, int head) {
            HeadGradients own = head_gradients(r, index, head);
            KeyValues cache = pass.cached(call.exchanged, r, index, head);
            for (int j = 0; j < group(); ++j) {
                if (waiting == MOST_QUERIES) differentiate();
                int64_t row = j * SOLVED_SLOTS + i, query = head * group() + j;
                float* grad = own.grad_outputs + row * width;
                memset(grad, 0, width * sizeof(float));
                memcpy(grad, ws.attended + r * ldo + query * d, d * sizeof(float));
                x[waiting] = grad, w[waiting] = cache.keys, exchanged[waiting] = cache.values;
                weights[waiting] = own.weights + row * room, scores[waiting] = own.grad_scores + row * room;
                to[waiting] = ws.qkv + r * ldq + query * d;
                ++waiting;
            }
        });
        if (waiting) differentiate();
    }

    // Computes the gradients of key and value of the slot itself.
    void gather(const HeadGradients& own, float* key, float* value) const {
        int d = spec.head_dim;
        int64_t begin = slots.block(slot), end = slots.block_end(slot), position = call.L + slot;
        for (int c = 0; c < d; c += LANES) {
            Vec k = splat(0.0f), v = k;
            if (end < slots.all())
                k = load(own.keys + slot * own.width + c), v = load(own.values + slot * own.width + c);
            for (int j = 0; j < group(); ++j)
                for (int64_t i = slot - begin; i < end - begin; ++i) {
                    int64_t row = j * SOLVED_SLOTS + i, at = row * own.room + position;
                    v = fma(splat(own.weights[at]), load(own.grad_outputs + row * own.width + c), v);
                    k = fma(splat(own.grad_scores[at]), load(own.queries + row * own.width + c), k);
                }
            store(key + c, k, d - c);
            store(value + c, v, d - c);
        }
    }

    // Takes the gradient of a query or key back through rotation and norm.
    void unprepare(float* grad, const float* raw, const float* norm) const {
        int d = spec.head_dim;
        int64_t angles = (call.L + slot) * (d / 2);
        if (spec.rotary != Rotary::none)
            rotate(grad, call.cos + angles, call.sin + angles, d, spec.rotary == Rotary::half, -1);
        if (spec.qk_norm) rms_norm_gradient(raw, norm, grad, d, grad, false);
    }

    void attend(int64_t index) const {
        const Layer& layer = call.block->layers[index];
        int d = spec.head_dim;
        int64_t ldq = padded(spec.qkv_dim());
        if (slot + 1 == slots.block_end(slot)) weigh_block(index);
        differentiate_queries(index);
        Rows raw = kept(index, &Kept::qkv, spec.qkv_dim());
        heads([&](int64_t r, int head) {
            float *q = ws.qkv + r * ldq, *k = q + (spec.heads + head) * d;
            gather(head_gradients(r, index, head), k, k + spec.kv_heads * d);
            unprepare(k, raw[r] + (k - q), layer.k_norm);
            for (int j = head * group(); j < (head + 1) * group(); ++j)
                unprepare(q + j * d, raw[r] + j * d, layer.q_norm);
        });
        if (slot == slots.block(slot)) send_block(index);
    }

    void attention(int64_t index) const {
        const Layer& layer = call.block->layers[index];
        const Transposed::Layer& back = solve.layers[index];
        int64_t width = padded(int64_t(spec.heads) * spec.head_dim);
        const float* grad = branch(index, &Kept::attn_branch, layer.attn_post_norm);
        pass.multiply(back.proj, grad, [&](int64_t m, int64_t c, Vec v) { store(ws.attended + m * width + c, v); });
        team.wait();
        attend(index);
        team.wait();
        pass.multiply(back.qkv, ws.qkv, [&](int64_t m, int64_t c, Vec v) { store(ws.h + m * C + c, v); });
        team.wait();
        add_through_norm(layer.attn_norm, kept(index, &Kept::h, spec.channels));
    }

    // Sets the gradient of the slot's input token.
    void embed(int64_t token) const {
        int64_t D = spec.token_dim;
        pass.multiply(solve.proj_in, ws.normed,
                      [&](int64_t m, int64_t c, Vec v) { store(pass.at(solve.u, m, token) + c, v, int(D - c)); });
        team.wait();
    }

    void run() const {
        int64_t token = spec.start ? slot - 1 : slot;
        for (int64_t r = 0; r < rows; ++r) solve_token(r);
        if (token < 0) {
            team.wait();
            return write_token();
        }
        head();
        for (int64_t i = spec.layers - 1; i >= 0; --i) {
            feed_forward(i);
            attention(i);
        }
        embed(token);
        if (token || spec.start) return;
        // The first token passes unchanged.
        for (int64_t r = team.begin(rows); r < team.end(rows); ++r) {
            const float* g = pass.at(solve.g, r, 0);
            float* u = pass.at(solve.u, r, 0);
            for (int64_t c = 0; c < spec.token_dim; ++c) u[c] = g[c] - u[c];
        }
    }
};

}  // namespace

void run_transposed(const BlockCall& call, int64_t group, float* cache, float* shared, float* own, Team& team) {
    const Spec& spec = call.block->spec;
    int64_t first = group * call.group, sequences = std::min(call.group, call.B - first);
    GradientSpace ws(spec, call.group, call.L + call.T, shared, own);
    for (int64_t slot = call.last - 1; slot >= call.first; --slot) {
        Pass pass{call, spec, team, ws, cache, first, sequences, slot, 1};
        Step{pass, ws}.run();
    }
    team.wait();
}

}  // namespace starflow::STARFLOW_ISA
