// One pass of the causal transformer of a flow block over a KV cache, one slot or many.
#pragma once

#include "affine.h"
#include "attention.h"
#include "kernels.h"
#include "transposed.h"

namespace starflow::STARFLOW_ISA {

struct Pass {
    const BlockCall& call;
    const Spec& spec;
    Team& team;
    Workspace& ws;
    float* cache;
    int64_t first_sequence, sequences, slot, n;

    int64_t rows() const { return sequences * call.copies; }
    int64_t values() const { return rows() * n; }
    // Returns the row in the call's tensors for row r of this group. Rows with the condition come first.
    int64_t global_row(int64_t r) const { return r / sequences * call.B + first_sequence + r % sequences; }
    int64_t order(int64_t token) const { return spec.flip ? call.T - 1 - token : token; }
    bool sampling() const { return call.state; }
    bool fills() const { return slot < 0 || (sampling() && slot < call.filled); }
    // Returns whether the input token of this step was computed by the step before.
    bool continues() const { return slot > call.first && slot > call.filled && slot > 0; }
    // Returns token t, counted in the block's own order, of a tensor (B, T, D) in the order of the data.
    template <class T>
    T* at(T* tensor, int64_t sequence, int64_t t) const {
        return tensor + ((first_sequence + sequence) * call.T + order(t)) * spec.token_dim;
    }

    template <class Done>
    void multiply(const Linear& linear, const float* x, int64_t ldx, int64_t M, Done done) const {
        int64_t tiles = padded(linear.out) / LANES, first = team.begin(tiles), last = team.end(tiles);
        auto with_bias = [&](int64_t m, int64_t tile, Vec v) __attribute__((always_inline)) {
            done(m, tile * LANES, v + load(linear.bias + tile * LANES));
        };
        Following following{};
        if (const Linear* next = linear.following) {
            int64_t stride = int64_t(next->in) * LANES, own = team.begin(padded(next->out) / LANES);
            following = {static_cast<const float*>(next->weight) + own * stride, stride};
        }
#if defined(__AVX512F__)
        if (spec.rounded) {
            int64_t pairs = (linear.in + 1) / 2;
            round_rows(x, ldx, M, linear.in, ws.rounded, padded(pairs));
            grouped_product(ws.rounded, padded(pairs), M, static_cast<const Bf16Pair*>(linear.weight), pairs, tiles,
                            first, last, ws.scratch, with_bias);
            return;
        }
#endif
        if (spec.bf16)
            grouped_product(x, ldx, M, static_cast<const Bf16*>(linear.weight), linear.in, tiles, first, last,
                            ws.scratch, with_bias);
        else
            product(x, ldx, M, static_cast<const float*>(linear.weight), linear.in, first, last, ws.scratch, with_bias,
                    nullptr, linear.following ? &following : nullptr);
    }

    template <class Done>
    void multiply(const Linear& linear, const float* x, Done done) const {
        multiply(linear, x, padded(linear.in), values(), done);
    }

    // Computes activation(gate x) * up x, and keeps both products where memory for them is given. Ends the phase.
    template <class Activation>
    void multiply_gated(const Linear& gate, const Linear& up, const float* x, int64_t width, float* kept_gate,
                        float* kept_up, Activation activation) const {
        multiply(gate, x, [&](int64_t m, int64_t c, Vec v) __attribute__((always_inline)) {
            store(ws.hidden + m * width + c, activation(v));
            if (kept_gate) store(kept_gate + m * width + c, v);
        });
        multiply(up, x, [&](int64_t m, int64_t c, Vec v) __attribute__((always_inline)) {
            float* at = ws.hidden + m * width + c;
            store(at, load(at) * v);
            if (kept_up) store(kept_up + m * width + c, v);
        });
        team.wait();
    }

    void embed_prefix() const {
        int64_t C = padded(spec.channels), width = spec.text_dim;
        for (int64_t r = 0; r < rows(); ++r) {
            const float* states = call.prefix + (global_row(r) * call.L + call.L + slot) * width;
            float* h = ws.h + r * n * C;
            multiply(call.block->proj_text, states, width, n,
                     [&](int64_t m, int64_t c, Vec v) { store(h + m * C + c, v); });
        }
    }

    // Returns the input token of slot s.
    const float* token(int64_t sequence, int64_t s) const {
        int64_t t = spec.start ? s - 1 : s;
        if (t < 0) return call.block->start;
        if (sampling() && !call.jacobi && continues()) return ws.fresh + sequence * padded(spec.token_dim);
        return at(sampling() ? call.state : call.input, sequence, t);
    }

    const float* cond(int64_t r, int64_t s) const {
        return call.cond + (global_row(r) * call.cond_slots + (call.cond_slots > 1 ? s : 0)) * spec.cond_dim();
    }

    void embed_tokens() const {
        int64_t C = padded(spec.channels), D = spec.token_dim;
        for (int64_t m = 0; m < values(); ++m)
            memcpy(ws.tokens + m * padded(D), token(m / n % sequences, slot + m % n), D * sizeof(float));
        multiply(call.block->proj_in, ws.tokens, [&](int64_t m, int64_t c, Vec v) {
            if (call.block->positions) v = v + load(call.block->positions + (slot + m % n) * C + c);
            if (call.cond) v = v + load(cond(m / n, slot + m % n) + c, spec.channels - int(c));
            store(ws.h + m * C + c, v);
        });
    }

    enum Modulation { SCALE, SHIFT, GATE };

    // Returns the C values by which a condition modulates a branch. All layers have the same number of branches.
    const float* modulation(int64_t m, int branch, Modulation which) const {
        int all = spec.layers * spec.branches();
        return cond(m / n, slot + m % n) + (1 + which * all + branch) * int64_t(spec.channels);
    }

    void adapt(int64_t m, int branch, float* to) const {
        const float *scale = modulation(m, branch, SCALE), *shift = modulation(m, branch, SHIFT);
        layer_norm(ws.h + m * padded(spec.channels), scale, shift, spec.channels, to);
    }

    // Keeps the states, and replaces them by their modulated norm. Ends the phase.
    void enter(int branch) const {
        int64_t C = padded(spec.channels);
        for (int64_t m = team.begin(values()); m < team.end(values()); ++m) {
            memcpy(ws.outer + m * C, ws.h + m * C, C * sizeof(float));
            adapt(m, branch, ws.h + m * C);
        }
        team.wait();
    }

    // Computes h = the states that `enter` kept + gate h. Ends the phase.
    void leave(int branch) const {
        int64_t C = padded(spec.channels);
        for (int64_t m = team.begin(values()); m < team.end(values()); ++m) {
            const float* gate = modulation(m, branch, GATE);
            for (int c = 0; c < spec.channels; c += LANES) {
                Vec gated = load(gate + c, spec.channels - c) * load(ws.h + m * C + c);
                store(ws.h + m * C + c, load(ws.outer + m * C + c) + gated);
            }
        }
        team.wait();
    }

    void transition(const Transition& weights, int branch) const {
        int64_t C = padded(spec.channels), width = padded(spec.transition_dim);
        for (int64_t m = 0; m < values(); ++m) adapt(m, branch, ws.normed + m * C);
        multiply_gated(weights.gate, weights.up, ws.normed, width, nullptr, nullptr, [](Vec v) { return silu(v); });
        multiply(weights.down, ws.hidden, [&](int64_t m, int64_t c, Vec v) {
            const float* gate = modulation(m, branch, GATE);
            float* at = ws.h + m * C + c;
            store(at, load(at) + load(gate + c, spec.channels - int(c)) * v);
        });
        team.wait();
    }

    const float* normalized(const NormWeights& weights) const {
        if (spec.norm == Norm::none) return ws.h;
        int64_t C = padded(spec.channels);
        if (spec.norm == Norm::layer_norm)
            layer_norm_rows(ws.h, values(), C, weights.weight, weights.bias, spec.channels, ws.normed);
        else
            for (int64_t m = 0; m < values(); ++m)
                rms_norm(ws.h + m * C, weights.weight, spec.channels, ws.normed + m * C);
        return ws.normed;
    }

    // Computes h += x W^T + b, with a norm of the branch before the addition where the block has one. Ends the phase.
    void add_branch(const Linear& linear, const float* x, const float* post_norm, float* kept) const {
        int64_t C = padded(spec.channels);
        float* to = spec.post_norm ? ws.branch : ws.h;
        multiply(linear, x, [&](int64_t m, int64_t c, Vec v) {
            float* at = to + m * C + c;
            store(at, spec.post_norm ? v : load(at) + v);
        });
        team.wait();
        if (!spec.post_norm) return;
        for (int64_t m = team.begin(values()); m < team.end(values()); ++m) {
            if (kept) memcpy(kept + m * C, to + m * C, C * sizeof(float));
            rms_norm(to + m * C, post_norm, spec.channels, to + m * C);
            for (int64_t c = 0; c < C; c += LANES)
                store(ws.h + m * C + c, load(ws.h + m * C + c) + load(to + m * C + c));
        }
        team.wait();
    }

    KeyValues cached(int64_t r, int64_t layer, int64_t head) const { return cached(cache, r, layer, head); }

    KeyValues cached(float* from, int64_t r, int64_t layer, int64_t head) const {
        int64_t S = padded(call.L + call.T), d = spec.head_dim, size = S * (d + padded(d));
        int64_t row = call.one_cache() ? global_row(r) : r;
        float* at = from + row * cache_floats(spec, call.L + call.T) + (layer * spec.kv_heads + head) * size;
        return {at, at + S * d, S};
    }

    // Returns where this pass keeps the rows of a value, see Kept; null if it keeps none.
    float* kept(int64_t layer, int64_t Kept::* place) const {
        if (!call.kept || slot < 0) return nullptr;
        Kept sizes(spec);
        float* passes = call.kept + (first_sequence * call.T + slot * sequences) * sizes.slot;
        return passes + (layer * sizes.layer + sizes.*place) * values();
    }

    void keep_states(int64_t layer, int64_t Kept::* place) const {
        int64_t C = padded(spec.channels), first = team.begin(values()) * C, last = team.end(values()) * C;
        if (float* to = kept(layer, place)) memcpy(to + first, ws.h + first, (last - first) * sizeof(float));
    }

    void prepare(float* x, const float* norm, int64_t position) const {
        int d = spec.head_dim;
        if (spec.qk_norm) rms_norm(x, norm, d, x);
        if (spec.rotary == Rotary::none) return;
        rotate(x, call.cos + position * (d / 2), call.sin + position * (d / 2), d, spec.rotary == Rotary::half);
    }

    // Norms and rotates the queries and the key of one key head of a row, and appends key and value to the cache.
    void append_head(const Layer& layer, int64_t index, int64_t r, int head) const {
        int d = spec.head_dim, group = spec.heads / spec.kv_heads;
        int64_t stride = padded(spec.qkv_dim()), position = call.L + slot;
        float* queries = ws.qkv + r * n * stride;
        float *keys = queries + (spec.heads + head) * d, *values = keys + spec.kv_heads * d;
        for (int64_t i = 0; i < n; ++i) {
            for (int j = head * group; j < (head + 1) * group; ++j)
                prepare(queries + i * stride + j * d, layer.q_norm, position + i);
            prepare(keys + i * stride, layer.k_norm, position + i);
        }
        for (int64_t i = 0; i < n;) {
            const float *key = keys + i * stride, *value = values + i * stride;
            bool tile = d % LANES == 0 && (position + i) % LANES == 0 && n - i >= LANES;
            auto append_to = [&](float* memory, const float* first, const float* second) {
                KeyValues to = cached(memory, r, index, head);
                tile ? append_tile(to, position + i, first, second, stride, d)
                     : append(to, position + i, first, second, d);
            };
            append_to(cache, key, value);
            if (call.exchanged) append_to(call.exchanged, value, key);
            i += tile ? LANES : 1;
        }
    }

    float attention_scale(int64_t r) const {
        return 1.0f / (__builtin_sqrtf(float(spec.head_dim)) * (r < sequences ? 1.0f : call.temperature));
    }

    // Attends with one token per row. A key-value head belongs to the thread that appends to it.
    void attend_token(const Layer& layer, int64_t index) const {
        int d = spec.head_dim, group = spec.heads / spec.kv_heads, waiting = 0;
        int64_t ldq = padded(spec.qkv_dim()), ldo = padded(int64_t(spec.heads) * d), room = padded(call.L + call.T);
        Query queries[MOST_QUERIES];
        auto attend_waiting = [&] {
            attend_each(queries, waiting, call.L + slot, d, ws.sums);
            waiting = 0;
        };
        for (int64_t item = team.rank; item < rows() * spec.kv_heads; item += team.size) {
            int64_t r = item / spec.kv_heads;
            int head = int(item % spec.kv_heads);
            append_head(layer, index, r, head);
            for (int j = head * group; j < (head + 1) * group; ++j) {
                if (waiting == MOST_QUERIES) attend_waiting();
                queries[waiting] = {ws.qkv + r * ldq + j * d, cached(r, index, head), attention_scale(r),
                                    ws.scores + waiting * room, ws.attended + r * ldo + j * d};
                ++waiting;
            }
        }
        if (waiting) attend_waiting();
        team.wait();
    }

    void attend_tokens(const Layer& layer, int64_t index) const {
        int d = spec.head_dim;
        int64_t ldq = padded(spec.qkv_dim()), ldo = padded(int64_t(spec.heads) * d);
        for (int64_t item = team.rank; item < rows() * spec.kv_heads; item += team.size)
            append_head(layer, index, item / spec.kv_heads, int(item % spec.kv_heads));
        team.wait();
        int64_t tiles = (n + MAX_ROWS - 1) / MAX_ROWS;
        for (int64_t item = team.rank; item < rows() * spec.heads * tiles; item += team.size) {
            int64_t i = item % tiles * MAX_ROWS, r = item / tiles / spec.heads, m = r * n + i;
            int head = int(item / tiles % spec.heads), count = int(n - i < MAX_ROWS ? n - i : MAX_ROWS);
            attend(ws.qkv + m * ldq + head * d, ldq, count, cached(r, index, head / (spec.heads / spec.kv_heads)),
                   call.L + slot + i, d, attention_scale(r), ws.scores, ws.sums, ws.attended + m * ldo + head * d, ldo);
        }
        team.wait();
    }

    void norm_queries_and_keys(const Layer& layer) const {
        int queries = spec.heads * spec.head_dim, keys = spec.kv_heads * spec.head_dim;
        for (int64_t m = team.begin(values()); m < team.end(values()); ++m) {
            float *q = ws.qkv + m * padded(spec.qkv_dim()), *k = q + queries;
            layer_norm(q, layer.q_layer_norm.weight, layer.q_layer_norm.bias, queries, q);
            layer_norm(k, layer.k_layer_norm.weight, layer.k_layer_norm.bias, keys, k);
        }
        team.wait();
    }

    void feed_forward(const Layer& layer, int64_t index) const {
        const float* x = normalized(layer.mlp_norm);
        int64_t width = padded(spec.mlp_dim);
        float *up = kept(index, &Kept::up), *gate = kept(index, &Kept::gate);
        if (spec.mlp == Mlp::gelu) {
            multiply(layer.up, x, [&](int64_t m, int64_t c, Vec v) {
                store(ws.hidden + m * width + c, gelu(v));
                if (up) store(up + m * width + c, v);
            });
            team.wait();
        } else {
            multiply_gated(layer.gate, layer.up, x, width, gate, up, [](Vec v) { return gelu_tanh(v); });
        }
        add_branch(layer.down, ws.hidden, layer.mlp_post_norm, kept(index, &Kept::mlp_branch));
    }

    void network() const {
        if (slot < 0)
            embed_prefix();
        else
            embed_tokens();
        team.wait();
        for (int i = 0; i < spec.layers; ++i) {
            const Layer& layer = call.block->layers[i];
            int branch = i * spec.branches();
            if (spec.adaptive) enter(branch);
            const float* x = normalized(layer.attn_norm);
            int64_t width = padded(spec.qkv_dim());
            float* qkv = kept(i, &Kept::qkv);
            keep_states(i, &Kept::h);
            multiply(layer.qkv, x, [&](int64_t m, int64_t c, Vec v) {
                store(ws.qkv + m * width + c, v);
                if (qkv) store(qkv + m * width + c, v);
            });
            team.wait();
            if (spec.qk_layer_norm) norm_queries_and_keys(layer);
            n == 1 ? attend_token(layer, i) : attend_tokens(layer, i);
            add_branch(layer.proj, ws.attended, layer.attn_post_norm, kept(i, &Kept::attn_branch));
            keep_states(i, &Kept::middle);
            feed_forward(layer, i);
            if (spec.adaptive) leave(branch);
            if (spec.transition_dim) transition(layer.transition, branch + 1);
        }
        keep_states(spec.layers, &Kept::h);
    }

    // Computes the raw parameters of the slots: into the output in the density direction, into the workspace in
    // sampling.
    void head() const {
        int64_t C = padded(spec.channels), P = spec.params_dim(), width = sampling() ? padded(P) : P;
        const float* x = ws.h;
        if (spec.final_norm) {
            for (int64_t m = 0; m < values(); ++m)
                rms_norm(ws.h + m * C, call.block->final_norm, spec.channels, ws.normed + m * C);
            x = ws.normed;
        }
        multiply(call.block->proj_out, x, [&](int64_t m, int64_t c, Vec v) {
            float* to = sampling() ? ws.params : call.params + (first_sequence * call.T + slot) * P;
            int64_t row = sampling() ? m : m / n * call.T + m % n;
            store(to + row * width + c, v, int(width - c));
        });
        team.wait();
    }

    // Returns the token that this slot's parameters belong to.
    int64_t target() const { return spec.start ? slot : slot + 1; }
};

}  // namespace starflow::STARFLOW_ISA
