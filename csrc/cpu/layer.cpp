// A transformer layer in training: what comes before and after its attention, a few rows at a time, so that what is
// between the products stays in cache.
#include "product.h"
#include "rows.h"

namespace starflow::STARFLOW_ISA {

namespace {

// Calls done(row, first column, value, columns that are left) for the product of x (M, in) and its bias.
template <class Done>
INLINE void multiply(const Linear& linear, const float* x, int64_t M, float* scratch, Done done) {
    product(x, linear.in, M, static_cast<const float*>(linear.weight), linear.in, 0, padded(linear.out) / LANES,
            scratch, [&](int64_t m, int64_t tile, Vec v) __attribute__((always_inline)) {
                int64_t n = tile * LANES;
                done(m, n, linear.bias ? v + load(linear.bias + n) : v, int(linear.out - n));
            });
}

INLINE int group(int64_t M, int64_t m) { return int(M - m < LANES ? M - m : LANES); }

Statistics statistics_of(const LayerCall& call, const float* x, int rows, int C) {
    bool centred = call.norm == Norm::layer_norm;
    return statistics(x, rows, C, C, centred, centred ? LAYER_NORM_EPS : RMS_NORM_EPS);
}

// Returns the norm of M rows, in `to` if there is a norm.
const float* normalized(const LayerCall& call, const NormWeights& weights, const float* x, int64_t M, int C,
                        float* to) {
    if (call.norm == Norm::none) return x;
    for (int64_t m = 0; m < M; m += LANES) {
        Statistics of = statistics_of(call, x + m * C, group(M, m), C);
        for (int r = 0; r < group(M, m); ++r)
            standardize(x + (m + r) * C, of.mean[r], of.scale[r], weights.weight, weights.bias, C, to + (m + r) * C);
    }
    return to;
}

// Adds the sum over `rows` rows of function(row) to to[0 .. 15].
template <class Function>
INLINE void add_rows(int rows, float* to, Function function) {
    Vec total = splat(0.0f);
    for (int r = 0; r < rows; ++r) total = total + function(r);
    store(to, load(to) + total);
}

// Sets grad_x to grad_sum plus the gradient of the norm of x, from that of its output, and `normed` to the norm.
void norm_backward(const LayerCall& call, const NormWeights& weights, const float* x, const float* grad,
                   const float* grad_sum, int64_t M, int C, float* grad_x, float* normed, float* totals) {
    if (call.norm == Norm::none) {
        for (int64_t i = 0; i < M * C; i += LANES) {
            int count = int(M * C - i < LANES ? M * C - i : LANES);
            store(grad_x + i, load(grad_sum + i, count) + load(grad + i, count), count);
        }
        return;
    }
    for (int64_t first = 0; first < M; first += LANES) {
        int rows = group(M, first);
        Statistics of = statistics_of(call, x + first * C, rows, C);
        auto normal = [&](int r, int c, int count) __attribute__((always_inline)) {
            return (load(x + (first + r) * C + c, count) - splat(of.mean[r])) * splat(of.scale[r]);
        };
        auto weighted = [&](int r, int c, int count) __attribute__((always_inline)) {
            return load(grad + (first + r) * C + c, count) * load(weights.weight + c);
        };
        Vec plain[LANES], inner[LANES], channels = splat(float(C));
        float constant[LANES] = {}, along[LANES];
        for (int r = 0; r < LANES; ++r) {
            plain[r] = inner[r] = splat(0.0f);
            for (int c = 0; c < C && r < rows; c += LANES) {
                Vec g = weighted(r, c, C - c);
                plain[r] = plain[r] + g;
                inner[r] = fma(g, normal(r, c, C - c), inner[r]);
            }
        }
        if (call.norm == Norm::layer_norm) store(constant, sums(plain) / channels);
        store(along, sums(inner) / channels);
        for (int c = 0; c < C; c += LANES) {
            int count = C - c;
            add_rows(rows, totals + c, [&](int r) __attribute__((always_inline)) {
                int64_t at = (first + r) * C + c;
                Vec y = normal(r, c, count);
                Vec to = splat(of.scale[r]) * fma(-y, splat(along[r]), weighted(r, c, count) - splat(constant[r]));
                store(grad_x + at, load(grad_sum + at, count) + to, count);
                store(normed + at, fma(y, load(weights.weight + c), load(weights.bias + c)), count);
                return load(grad + at, count) * y;
            });
            add_rows(rows, totals + padded(C) + c,
                     [&](int r) __attribute__((always_inline)) { return load(grad + (first + r) * C + c, count); });
        }
    }
}

// Sets `to` to x times `drop` for n values.
void dropped(const float* x, const float* drop, int64_t n, float* to) {
    for (int64_t i = 0; i < n; i += LANES) {
        int count = int(n - i < LANES ? n - i : LANES);
        store(to + i, load(x + i, count) * load(drop + i, count), count);
    }
}

struct Rooms {
    float *row, *hidden, *scratch;  // rows of C and of the MLP's values, and memory of the products

    Rooms(float* from, int64_t C, int64_t hidden_values) {
        row = from;
        hidden = row + padded(LAYER_ROWS * C);
        scratch = hidden + padded(LAYER_ROWS * hidden_values);
    }
};

}  // namespace

void layer_enter(const LayerCall& call, int64_t first, int64_t last, float* scratch) {
    int64_t C = call.qkv.in, M = last - first;
    Rooms rooms(scratch, C, call.up.out);
    const float* x = normalized(call, call.attn_norm, call.h + first * C, M, int(C), rooms.row);
    float* to = call.qkv_values + first * call.qkv.out;
    multiply(call.qkv, x, M, rooms.scratch, [&](int64_t m, int64_t n, Vec v, int left) __attribute__((always_inline)) {
        store(to + m * call.qkv.out + n, v, left);
    });
}

void layer_leave(const LayerCall& call, int64_t first, int64_t last, float* scratch) {
    int64_t C = call.qkv.in, F = call.up.out, M = last - first;
    Rooms rooms(scratch, C, F);
    // Ends a branch: to = from + drop times the product.
    auto add_branch = [&](const Linear& linear, const float* x, const float* drop, const float* from, float* to) {
        multiply(linear, x, M, rooms.scratch,
                 [&](int64_t m, int64_t n, Vec v, int left) __attribute__((always_inline)) {
                     int64_t at = (first + m) * C + n;
                     if (drop) v = v * load(drop + at, left);
                     store(to + at, load(from + at, left) + v, left);
                 });
    };
    add_branch(call.proj, call.attended + first * call.proj.in, call.drop_attention, call.h, call.mid);
    const float* x = normalized(call, call.mlp_norm, call.mid + first * C, M, int(C), rooms.row);
    multiply(call.up, x, M, rooms.scratch, [&](int64_t m, int64_t n, Vec v, int left) __attribute__((always_inline)) {
        store(call.pre + (first + m) * F + n, v, left);
        store(rooms.hidden + m * F + n, gelu(v), left);
    });
    add_branch(call.down, rooms.hidden, call.drop_mlp, call.mid, call.out);
}

void layer_leave_backward(const LayerCall& call, int64_t first, int64_t last, float* scratch, float* totals) {
    int64_t C = call.down.in, F = call.down.out, A = call.proj.out, M = last - first, at = first * C;
    Rooms rooms(scratch, C, F);
    if (call.drop_mlp) dropped(call.grad_out + at, call.drop_mlp + at, M * C, call.branch_mlp + at);
    multiply(call.down, call.branch_mlp + at, M, rooms.scratch,
             [&](int64_t m, int64_t n, Vec v, int left) __attribute__((always_inline)) {
                 int64_t i = (first + m) * F + n;
                 Vec x = load(call.pre + i, left);
                 store(call.hidden + i, gelu(x), left);
                 store(call.grad_pre + i, v * gelu_gradient(x), left);
             });
    multiply(call.up, call.grad_pre + first * F, M, rooms.scratch,
             [&](int64_t m, int64_t n, Vec v, int left)
                 __attribute__((always_inline)) { store(rooms.row + m * C + n, v, left); });
    norm_backward(call, call.mlp_norm, call.mid + at, rooms.row, call.grad_out + at, M, int(C), call.grad_mid + at,
                  call.normed_mid + at, totals);
    if (call.drop_attention) dropped(call.grad_mid + at, call.drop_attention + at, M * C, call.branch_attention + at);
    multiply(call.proj, call.branch_attention + at, M, rooms.scratch,
             [&](int64_t m, int64_t n, Vec v, int left)
                 __attribute__((always_inline)) { store(call.grad_attended + (first + m) * A + n, v, left); });
}

void layer_enter_backward(const LayerCall& call, int64_t first, int64_t last, float* scratch, float* totals) {
    int64_t C = call.down.in, M = last - first, at = first * C;
    Rooms rooms(scratch, C, call.down.out);
    multiply(call.qkv, call.grad_qkv + first * call.qkv.in, M, rooms.scratch,
             [&](int64_t m, int64_t n, Vec v, int left)
                 __attribute__((always_inline)) { store(rooms.row + m * C + n, v, left); });
    norm_backward(call, call.attn_norm, call.h + at, rooms.row, call.grad_mid + at, M, int(C), call.grad_h + at,
                  call.normed + at, totals);
}

}  // namespace starflow::STARFLOW_ISA
