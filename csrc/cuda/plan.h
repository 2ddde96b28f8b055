// Layout of a flow block's weights, KV cache and activations in shared memory. The thread blocks of a cluster share the
// outputs of every product and the KV cache evenly, and each has all activations.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "../spec.h"

#ifdef __CUDACC__
#define STARFLOW_ANYWHERE __host__ __device__ constexpr
#else
#define STARFLOW_ANYWHERE constexpr
#endif

namespace starflow::cuda {

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int MOST_ROWS = 64;    // per thread block
constexpr int MOST_CLUSTER = 8;  // thread blocks per cluster, possible on every device that has clusters

// Offsets below are bytes from the start of shared memory. Offsets of a layer count from the start of the layer.
struct Dense {
    // float32: weight [in / 4][out][4]; bfloat16: the fragments of multiply_add, [out / 16][in / 16][32 lanes][8].
    // Both are padded with zeros. bias is -1 for none. Of all `out` outputs, a thread block has up to `share`.
    int weight, bias, in, out, share;
};

struct NormPlaces {
    int weight, bias;
};

struct LayerPlaces {
    NormPlaces attn_norm, mlp_norm;
    Dense qkv, proj, gate, up, down;
    int q_norm, k_norm, attn_post_norm, mlp_post_norm;
};

struct Plan {
    int cluster;  // thread blocks that share the weights: a power of two
    Dense proj_in, proj_out;
    int start, final_norm, layers, layer_bytes, weight_bytes;
    LayerPlaces layer;
    // Each thread block holds every cluster-th slot of the keys and a share of the dimensions of the values.
    int slots, key_slots, value_dims;
    // Values of KV cache per thread block: of the keys of a head, padded to vectors; of a head; of a row.
    int key_values, cache_head, cache_row;
    bool cached_on_chip;  // else it is in device memory; each thread block reads only its own part
    // Rows of activations. h: the state, of C values. mid: results of norms and attention. wide: q k v, the MLP and the
    // parameters. tokens: the tokens. h_row, mid_row, ... are the distances between rows in floats.
    int cache, h, mid, wide, tokens, scores, activations;
    int h_row, mid_row, wide_row, token_row;
    int group, copies;  // samples per cluster, rows per sample
    int bytes;          // at most TOO_LARGE
};

constexpr int TOO_LARGE = 1 << 30;

constexpr int64_t divided_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
constexpr int64_t padded(int64_t n, int to) { return (n + to - 1) / to * to; }

// Returns the floats per row of n activations: whole fragments, and 8 or 24 modulo the 32 banks, so that eight rows do
// not collide.
constexpr int row_floats(int n) { return int(padded(n, 16)) + 8; }

// Returns the rows that a thread (float32) or a warp (bfloat16) takes at once in a product of `share` outputs: as many as
// leave work for every one.
STARFLOW_ANYWHERE int tile_rows(int64_t rows, int64_t share, bool bf16) {
    int64_t work = rows * share;
    if (bf16) return rows > 16 && work >= 32 * 16 * WARPS ? 32 : 8;
    return work >= 8 * THREADS ? 8 : work >= 2 * THREADS ? 2 : 1;
}

class Taker {
public:
    int at = 0;
    int take(int64_t bytes) {
        int taken = at;
        int64_t end = at + (bytes + 15) / 16 * 16;
        at = int(end < TOO_LARGE ? end : TOO_LARGE);
        return taken;
    }
    int vector(int64_t floats) { return take(4 * floats); }
};

// Places a thread block's weights in the order of BlockSpec.weight_shapes, except the position table, which stays in
// device memory.
inline void place_weights(const Spec& spec, Plan& plan) {
    Taker taker;
    int C = spec.channels;
    auto dense = [&](int out, int in, bool bias) {
        int64_t share = padded(divided_up(out, plan.cluster), spec.bf16 ? 16 : 1);
        int weight = taker.take(share * (spec.bf16 ? 2 * padded(in, 16) : 4 * padded(in, 4)));
        return Dense{weight, bias ? taker.vector(share) : -1, in, out, int(share)};
    };
    auto norm = [&] {
        NormPlaces places{-1, -1};
        if (spec.norm != Norm::none) places.weight = taker.vector(C);
        if (spec.norm == Norm::layer_norm) places.bias = taker.vector(C);
        return places;
    };
    plan.proj_in = dense(C, spec.token_dim, true);
    plan.start = spec.start ? taker.vector(spec.token_dim) : -1;
    plan.layers = taker.at;
    LayerPlaces layer{};
    taker.at = 0;
    layer.attn_norm = norm();
    layer.qkv = dense(spec.qkv_dim(), C, spec.bias);
    if (spec.qk_norm) layer.q_norm = taker.vector(spec.head_dim), layer.k_norm = taker.vector(spec.head_dim);
    layer.proj = dense(C, spec.heads * spec.head_dim, spec.bias);
    if (spec.post_norm) layer.attn_post_norm = taker.vector(C);
    layer.mlp_norm = norm();
    if (spec.mlp == Mlp::swiglu) layer.gate = dense(spec.mlp_dim, C, spec.bias);
    layer.up = dense(spec.mlp_dim, C, spec.bias);
    layer.down = dense(C, spec.mlp_dim, spec.bias);
    if (spec.post_norm) layer.mlp_post_norm = taker.vector(C);
    plan.layer = layer;
    plan.layer_bytes = taker.at;
    taker.at = plan.layers;
    taker.take(int64_t(spec.layers) * plan.layer_bytes);
    plan.final_norm = spec.final_norm ? taker.vector(C) : -1;
    plan.proj_out = dense(spec.params_dim(), C, true);
    plan.weight_bytes = taker.at;
}

// Returns the plan for `group` samples of T tokens with `copies` rows each.
inline Plan make_plan(const Spec& spec, int64_t T, int copies, int group, bool cached_on_chip, int cluster) {
    auto most = [](int a, int b) { return a > b ? a : b; };
    auto limited = [](int64_t n) { return int(n < TOO_LARGE ? n : TOO_LARGE); };
    Plan plan{};
    plan.cluster = cluster;
    place_weights(spec, plan);
    Taker taker;
    taker.at = plan.weight_bytes;
    int64_t rows = int64_t(group) * copies, slots = spec.start ? T : T - 1;
    plan.group = group;
    plan.copies = copies;
    plan.slots = limited(slots);
    plan.key_slots = limited(divided_up(slots, cluster));
    plan.value_dims = int(divided_up(spec.head_dim, cluster));
    int vector = spec.bf16 ? 8 : 4;
    int64_t key_values = divided_up(slots, cluster) * padded(spec.head_dim, vector);
    int64_t cache_head = key_values + padded(slots * plan.value_dims, vector);
    plan.key_values = limited(key_values);
    plan.cache_head = limited(cache_head);
    plan.cache_row = limited(cache_head * spec.layers * spec.kv_heads);
    plan.h_row = row_floats(spec.channels);
    plan.mid_row = row_floats(most(spec.channels, spec.heads * spec.head_dim));
    plan.wide_row = row_floats(most(most(spec.channels, spec.params_dim()), most(spec.qkv_dim(), spec.mlp_dim)));
    plan.token_row = row_floats(spec.token_dim);
    plan.cached_on_chip = cached_on_chip;
    plan.cache = taker.take(cached_on_chip ? rows * plan.cache_row * (spec.bf16 ? 2 : 4) : 0);
    plan.activations = taker.at;
    plan.h = taker.vector(rows * plan.h_row);
    plan.mid = taker.vector(rows * plan.mid_row);
    plan.wide = taker.vector(rows * plan.wide_row);
    plan.tokens = taker.vector(rows * plan.token_row);
    // The thread blocks of a cluster exchange the scores of all queries. Without a cluster, each warp reuses its own
    // room.
    plan.scores = taker.vector(slots * (cluster > 1 ? rows * spec.heads : WARPS));
    plan.bytes = taker.at;
    return plan;
}

}  // namespace starflow::cuda
