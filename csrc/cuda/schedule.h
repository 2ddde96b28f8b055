// The phases of the persistent inverse, and the layout of its weights, its workspace and its shared memory. Phases are
// separated by barriers of the whole grid. They do not depend on the number of thread blocks.
#pragma once

#include "plan.h"

namespace starflow::cuda {

constexpr int MOST_STREAM_ROWS = 16;  // rows of activations, guided ones twice
constexpr int TILE = 8;               // outputs per tile of a product
constexpr int STEP_BYTES = 512;       // weights of one tile that a warp multiplies at a time
constexpr int BIAS_BYTES = TILE * 4;
constexpr int SPLIT = 64;  // slots per split of attention
constexpr int MOST_STAGES = 32;

// Weights are tiles one after the other: the fragments of a warp's steps, [steps][32 lanes][16 bytes], then the biases
// in float32. `at` counts bytes from the start of the weights, for a layer from the start of the layer.
struct Product {
    int64_t at;
    int in, out, tiles, steps;

    STARFLOW_ANYWHERE int64_t tile_bytes() const { return int64_t(steps) * STEP_BYTES + BIAS_BYTES; }
    STARFLOW_ANYWHERE int64_t bytes() const { return tiles * tile_bytes(); }
};

// Vectors in float32. Offsets count floats, in a layer from the start of the layer; -1 for none.
struct LayerVectors {
    NormPlaces attn_norm, mlp_norm;
    int q_norm, k_norm, attn_post_norm, mlp_post_norm;
};

struct Schedule {
    Product text, embed, head;             // text.tiles is 0 without text
    Product qkv, project, up, down;        // of one layer; `up` holds gate and up, four outputs of each per tile
    int64_t layers, layer_bytes, weights;  // bytes: start of the layers, size of one, size of all
    int layer_count, start, final_norm, vector_layers, layer_vectors, vectors;
    LayerVectors layer;

    int rows, prefix, slots;  // slots counts the prefix
    int splits;               // most splits of attention
    int head_row;             // values per slot of a head in the cache
    int64_t cache;            // values of the cache
    // Workspace in floats. h and h_next take turns where a norm follows the branch. Rows of mid and wide hold values in
    // the dtype of the weights, zeros behind them.
    int64_t h, h_next, branch, qkv_out, mid, wide, parts, counters, workspace;
    int h_row, mid_row, wide_row, qkv_row, part_row;  // distances between rows in values
    // Shared memory in bytes.
    int barriers, sums, statistics, x, states, branches, ring, bytes;
    int stage_steps, stages, x_row;
    bool resident;  // every thread block keeps its weights on chip

    // Returns product number `index` of a step, of which the first `prefix` read text: embedding, four per layer, head.
    STARFLOW_ANYWHERE const Product& product(int64_t step, int index) const {
        if (index == 0) return step < prefix ? text : embed;
        if (index == last()) return head;
        int kind = (index - 1) % 4;
        return kind == 0 ? qkv : kind == 1 ? project : kind == 2 ? up : down;
    }
    // Returns the start of the weights of that product.
    STARFLOW_ANYWHERE int64_t weights_at(int64_t step, int index) const {
        bool in_layer = index != 0 && index != last();
        return product(step, index).at + (in_layer ? layers + (index - 1) / 4 * layer_bytes : 0);
    }
    STARFLOW_ANYWHERE int last() const { return 1 + 4 * layer_count; }
    STARFLOW_ANYWHERE int products(int64_t step) const { return step < prefix ? last() : last() + 1; }
    STARFLOW_ANYWHERE int stage_bytes() const { return stage_steps * STEP_BYTES + BIAS_BYTES; }
    constexpr int stages_of(const Product& of) const { return int(divided_up(of.steps, stage_steps)); }
};

// Values along the inputs of a product that a warp multiplies at a time.
STARFLOW_ANYWHERE int step_depth(const Spec& spec) { return STEP_BYTES / TILE / (spec.bf16 ? 2 : 4); }

inline void place_stream(const Spec& spec, Schedule& schedule) {
    int C = spec.channels, D = spec.token_dim, depth = step_depth(spec);
    int64_t at = 0;
    auto product = [&](int out, int in) {
        Product placed{at, in, out, int(divided_up(out, TILE)), int(divided_up(in, depth))};
        at += placed.bytes();
        return placed;
    };
    // Products whose results are used in pairs hold four outputs of each in a tile.
    auto pairs = [&](int out, int in) { return product(int(padded(out, TILE / 2)) * 2, in); };
    if (spec.text_dim) schedule.text = product(C, spec.text_dim);
    schedule.embed = product(C, D);
    schedule.head = spec.affine.scale == Scale::unit ? product(D, C) : pairs(D, C);
    schedule.layers = at;
    at = 0;
    schedule.qkv = product(spec.qkv_dim(), C);
    schedule.project = product(C, spec.heads * spec.head_dim);
    schedule.up = spec.mlp == Mlp::swiglu ? pairs(spec.mlp_dim, C) : product(spec.mlp_dim, C);
    schedule.down = product(C, spec.mlp_dim);
    schedule.layer_bytes = at;
    schedule.layer_count = spec.layers;
    schedule.weights = schedule.layers + spec.layers * schedule.layer_bytes;

    int floats = 0;
    auto vector = [&](bool there, int n) {
        if (!there) return -1;
        floats += n;
        return floats - n;
    };
    auto norm = [&] {
        int weight = vector(spec.norm != Norm::none, C);
        return NormPlaces{weight, vector(spec.norm == Norm::layer_norm, C)};
    };
    schedule.start = vector(spec.start, D);
    schedule.final_norm = vector(spec.final_norm, C);
    schedule.vector_layers = floats;
    floats = 0;
    schedule.layer.attn_norm = norm();
    schedule.layer.q_norm = vector(spec.qk_norm, spec.head_dim);
    schedule.layer.k_norm = vector(spec.qk_norm, spec.head_dim);
    schedule.layer.attn_post_norm = vector(spec.post_norm, C);
    schedule.layer.mlp_norm = norm();
    schedule.layer.mlp_post_norm = vector(spec.post_norm, C);
    schedule.layer_vectors = floats;
    schedule.vectors = schedule.vector_layers + spec.layers * schedule.layer_vectors;
}

// Returns how many stages the thread block with the most has in a token step.
inline int64_t most_stages(const Schedule& schedule, int blocks) {
    int64_t most = 0;
    for (int block = 0; block < blocks; ++block) {
        int64_t base = 0, stages = 0;
        for (int index = 0; index < schedule.products(schedule.prefix); ++index) {
            const Product& product = schedule.product(schedule.prefix, index);
            for (int64_t tile = (block - base + blocks) % blocks; tile < product.tiles; tile += blocks)
                stages += schedule.stages_of(product);
            base = (base + product.tiles) % blocks;
        }
        most = stages > most ? stages : most;
    }
    return most;
}

// Returns the schedule of `rows` rows with `prefix` text states and T tokens. The ring has as many stages as fit into
// `limit` bytes, at most `most`, and 0 if there is no room for one. stage_steps: a multiple of WARPS.
inline Schedule make_schedule(const Spec& spec, int rows, int64_t prefix, int64_t T, int64_t limit, int blocks,
                              int stage_steps, int most) {
    auto limited = [](int64_t n) { return int(n < TOO_LARGE ? n : TOO_LARGE); };
    auto larger = [](int64_t a, int64_t b) { return a > b ? a : b; };
    Schedule schedule{};
    place_stream(spec, schedule);
    int64_t slots = prefix + (spec.start ? T : T - 1), attended = spec.heads * int64_t(spec.head_dim);
    int width = spec.bf16 ? 2 : 4;
    schedule.rows = rows;
    schedule.prefix = limited(prefix);
    schedule.slots = limited(slots);
    schedule.splits = limited(divided_up(slots, SPLIT));
    schedule.head_row = int(padded(spec.head_dim, 8));
    schedule.cache = int64_t(2) * spec.layers * rows * spec.kv_heads * slots * schedule.head_row;
    schedule.h_row = limited(padded(spec.channels, 32));
    schedule.mid_row = limited(padded(attended, 32));
    schedule.wide_row = limited(padded(spec.mlp_dim, 32));
    schedule.qkv_row = spec.qkv_dim();
    schedule.part_row = spec.head_dim + 2;
    int64_t floats = 0;
    auto room = [&](int64_t n) {
        floats += padded(n, 32);
        return floats - padded(n, 32);
    };
    schedule.h = room(int64_t(rows) * schedule.h_row);
    schedule.h_next = room(spec.post_norm ? int64_t(rows) * schedule.h_row : 0);
    schedule.branch = room(spec.post_norm ? int64_t(rows) * schedule.h_row : 0);
    schedule.qkv_out = room(int64_t(rows) * schedule.qkv_row);
    schedule.mid = room(int64_t(rows) * schedule.mid_row * width / 4);
    schedule.wide = room(int64_t(rows) * schedule.wide_row * width / 4);
    schedule.parts = room(int64_t(rows) * spec.heads * schedule.splits * schedule.part_row);
    schedule.counters = room(1 + int64_t(rows) * spec.kv_heads);
    schedule.workspace = floats;

    Taker taker;
    schedule.barriers = taker.take(8 * MOST_STAGES);
    schedule.sums = taker.vector(2 * WARPS * rows * TILE);
    schedule.statistics = taker.vector(2 * rows * WARPS);
    int64_t deepest = larger(larger(spec.channels, attended), larger(spec.mlp_dim, spec.token_dim));
    if (prefix) deepest = larger(deepest, spec.text_dim);
    // Eight rows that a warp reads at a time do not collide.
    schedule.x_row = limited(padded(deepest, 32) + 8);
    int group = spec.heads / spec.kv_heads;
    int64_t attention = (group + 2 + WARPS) * int64_t(schedule.head_row) + group * (SPLIT + 2) + 4;
    schedule.x = taker.take(larger(int64_t(rows) * schedule.x_row * width, 4 * attention));
    schedule.states = taker.vector(int64_t(rows) * schedule.h_row);
    schedule.branches = taker.vector(spec.post_norm ? int64_t(rows) * schedule.h_row : 0);
    schedule.ring = taker.at;
    schedule.stage_steps = stage_steps;
    int64_t stages = (limit - taker.at) / schedule.stage_bytes(), wanted = most_stages(schedule, blocks);
    stages = stages < most ? stages : most;
    schedule.resident = !prefix && stages >= wanted;
    schedule.stages = stages < 0 ? 0 : int(stages);
    schedule.bytes = limited(int64_t(taker.at) + schedule.stages * schedule.stage_bytes());
    return schedule;
}

}  // namespace starflow::cuda
