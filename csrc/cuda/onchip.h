// The whole inverse of a flow block, by one thread block or by a cluster of them. Weights, activations and, if it fits,
// the KV cache stay in shared memory for all steps. In a cluster, each thread block computes its share of every result,
// stores it to all, and waits for the others. float32 weights use float32 multiply-adds. bfloat16 weights use the
// tensor cores, with activations rounded to bfloat16. Every sum is float32 and has one order for every group and
// cluster.
#pragma once

#include "cluster.h"
#include "elementary.h"
#include "launch.h"

namespace starflow::cuda {

struct alignas(8) Pair {
    float one, two;
};

// The steps of one group of samples. Weight: type of weights and KV cache, float or Bf16. The place of the cache is
// known at compile time, so that its accesses compile for one kind of memory.
template <class Weight, bool CACHED_ON_CHIP, bool CLUSTERED>
struct Onchip : Cluster<CLUSTERED> {
    using Cluster<CLUSTERED>::rank, Cluster<CLUSTERED>::size, Cluster<CLUSTERED>::barrier, Cluster<CLUSTERED>::store;
    static constexpr int VECTOR = Vector<Weight>::SIZE;

    const OnchipCall& call;
    char* shared;
    int64_t first;      // first sample of the group
    int samples, rows;  // rows with the condition come first

    STARFLOW_DEVICE const Spec& spec() const { return call.spec; }
    STARFLOW_DEVICE const Plan& plan() const { return call.plan; }
    STARFLOW_DEVICE float* floats(int offset) const { return reinterpret_cast<float*>(shared + offset); }
    STARFLOW_DEVICE float* h(int row) const { return floats(plan().h) + row * plan().h_row; }
    STARFLOW_DEVICE float* mid(int row) const { return floats(plan().mid) + row * plan().mid_row; }
    STARFLOW_DEVICE float* wide(int row) const { return floats(plan().wide) + row * plan().wide_row; }
    STARFLOW_DEVICE float* token(int row) const { return floats(plan().tokens) + row * plan().token_row; }
    STARFLOW_DEVICE static int lane() { return thread_index() % WARP; }
    STARFLOW_DEVICE static int warp() { return thread_index() / WARP; }

    // Returns how many outputs of a product this thread block has, from rank() * share on; at most 0 past the last one.
    STARFLOW_DEVICE int outputs(const Dense& dense) const {
        if constexpr (!CLUSTERED) return dense.out;
        int left = dense.out - rank() * dense.share;
        return left < dense.share ? left : dense.share;
    }

    STARFLOW_DEVICE Weight* cache() const {
        if constexpr (CACHED_ON_CHIP) return reinterpret_cast<Weight*>(shared + plan().cache);
        int64_t rows_before = int64_t(block_index()) * plan().group * plan().copies;
        return static_cast<Weight*>(call.cache) + rows_before * plan().cache_row;
    }

    // Returns token t, counted in the block's own order.
    STARFLOW_DEVICE float* at(int sample, int64_t t) const {
        int64_t place = spec().flip ? call.T - 1 - t : t;
        return call.state + ((first + sample) * call.T + place) * spec().token_dim;
    }

    // Calls done(row, n, (x W^T + b)[row, n]) for the thread block's columns n. A thread takes TILE rows of one column,
    // with four partial sums for each, by k mod 4.
    template <int TILE, class Done>
    STARFLOW_DEVICE void multiply_tiles(const Dense& dense, int layer, const float* x, int x_row, Done done) const {
        auto weights = reinterpret_cast<const Quad<float>*>(shared + layer + dense.weight);
        int tiles = (rows + TILE - 1) / TILE, depth = (dense.in + 3) / 4, own = outputs(dense);
        for (int item = thread_index(); item < tiles * own; item += THREADS) {
            int n = item % own, top = item / own * TILE;
            const float* from[TILE];
            float sums[TILE][4];
            STARFLOW_UNROLL
            for (int m = 0; m < TILE; ++m) {
                from[m] = x + (top + m < rows ? top + m : rows - 1) * x_row;
                for (int j = 0; j < 4; ++j) sums[m][j] = 0;
            }
            for (int k = 0; k < depth; ++k) {
                Quad<float> quad = weights[k * dense.share + n];
                STARFLOW_UNROLL
                for (int m = 0; m < TILE; ++m) {
                    Quad<float> values = reinterpret_cast<const Quad<float>*>(from[m])[k];
                    STARFLOW_UNROLL
                    for (int j = 0; j < 4; ++j) sums[m][j] = fmaf(values.values[j], quad.values[j], sums[m][j]);
                }
            }
            float bias = dense.bias < 0 ? 0.0f : floats(layer + dense.bias)[n];
            int column = rank() * dense.share + n;
            STARFLOW_UNROLL
            for (int m = 0; m < TILE; ++m)
                if (top + m < rows) done(top + m, column, (sums[m][0] + sums[m][1]) + (sums[m][2] + sums[m][3]) + bias);
        }
    }

    // Does the same on the tensor cores: a warp takes 16 columns n of TILE times 8 rows.
    template <int TILE, class Done>
    STARFLOW_DEVICE void multiply_fragments(const Dense& dense, int layer, const float* x, int x_row, Done done) const {
        struct alignas(16) Fragment {
            uint32_t values[4];
        };
        auto weights = reinterpret_cast<const Fragment*>(shared + layer + dense.weight);
        int own = outputs(dense), begin = rank() * dense.share, columns = (own + 15) / 16;
        int depth = (dense.in + 15) / 16, tiles = (rows + 8 * TILE - 1) / (8 * TILE);
        int g = lane() / 4, t = lane() % 4 * 2;
        for (int item = warp(); item < tiles * columns; item += WARPS) {
            int n = item % columns, top = item / columns * 8 * TILE;
            const float* from[TILE];
            float sums[TILE][4];
            STARFLOW_UNROLL
            for (int m = 0; m < TILE; ++m) {
                int row = top + 8 * m + g;
                from[m] = x + (row < rows ? row : rows - 1) * x_row + t;
                for (int j = 0; j < 4; ++j) sums[m][j] = 0;
            }
            for (int k = 0; k < depth; ++k) {
                Fragment fragment = weights[(n * depth + k) * WARP + lane()];
                STARFLOW_UNROLL
                for (int m = 0; m < TILE; ++m) {
                    auto low = *reinterpret_cast<const Pair*>(from[m] + 16 * k);
                    auto high = *reinterpret_cast<const Pair*>(from[m] + 16 * k + 8);
                    uint32_t b[2] = {bf16_pair(low.one, low.two), bf16_pair(high.one, high.two)};
                    multiply_add(fragment.values, b, sums[m]);
                }
            }
            STARFLOW_UNROLL
            for (int m = 0; m < TILE; ++m)
                for (int j = 0; j < 4; ++j) {
                    int row = top + 8 * m + t + j % 2, column = 16 * n + g + j / 2 * 8;
                    if (row >= rows || column >= own) continue;
                    float bias = dense.bias < 0 ? 0.0f : floats(layer + dense.bias)[column];
                    done(row, begin + column, sums[m][j] + bias);
                }
        }
    }

    template <class Done>
    STARFLOW_DEVICE void multiply(const Dense& dense, int layer, const float* x, int x_row, Done done) const {
        constexpr bool BF16 = sizeof(Weight) == sizeof(Bf16);
        int tile = tile_rows(rows, dense.share, BF16);
        if constexpr (BF16) {
            if (tile == 32)
                multiply_fragments<4>(dense, layer, x, x_row, done);
            else
                multiply_fragments<1>(dense, layer, x, x_row, done);
        } else {
            if (tile == 8)
                multiply_tiles<8>(dense, layer, x, x_row, done);
            else if (tile == 2)
                multiply_tiles<2>(dense, layer, x, x_row, done);
            else
                multiply_tiles<1>(dense, layer, x, x_row, done);
        }
    }

    // Returns the norm of h for the next product, computed by one warp per row.
    STARFLOW_DEVICE const float* normalized(const NormPlaces& places, int layer) const {
        if (spec().norm == Norm::none) return h(0);
        for (int row = warp(); row < rows; row += WARPS) {
            const float* weight = floats(layer + places.weight);
            if (spec().norm == Norm::layer_norm)
                layer_norm(h(row), weight, floats(layer + places.bias), spec().channels, mid(row));
            else
                rms_norm(h(row), weight, spec().channels, mid(row));
        }
        block_barrier();
        return mid(0);
    }

    STARFLOW_DEVICE int normalized_row() const { return spec().norm == Norm::none ? plan().h_row : plan().mid_row; }

    // Computes h += x W^T + b, with a norm of the branch before the addition where the block has one.
    STARFLOW_DEVICE void add_branch(const Dense& dense, int layer, const float* x, int x_row, int post_norm,
                                    float* branch, int branch_row) const {
        bool post = spec().post_norm;
        multiply(dense, layer, x, x_row, [&](int row, int n, float value) {
            if (post)
                store(branch + row * branch_row + n, value);
            else
                store(h(row) + n, h(row)[n] + value);
        });
        barrier();
        if (!post) return;
        for (int row = warp(); row < rows; row += WARPS) {
            float* update = branch + row * branch_row;
            rms_norm(update, floats(layer + post_norm), spec().channels, update);
            for (int i = lane(); i < spec().channels; i += WARP) h(row)[i] += update[i];
        }
        barrier();
    }

    // Norms and rotates the query or key of one head, by the lanes of a warp.
    STARFLOW_DEVICE void prepare(float* x, int norm, int slot) const {
        int d = spec().head_dim;
        if (spec().qk_norm) {
            rms_norm(x, floats(norm), d, x);
            warp_barrier();
        }
        if (spec().rotary == Rotary::none) return;
        bool half = spec().rotary == Rotary::half;
        for (int i = lane(); i < d / 2; i += WARP) {
            float c = call.cos[int64_t(slot) * (d / 2) + i], s = call.sin[int64_t(slot) * (d / 2) + i];
            float &one = x[half ? i : 2 * i], &two = x[half ? i + d / 2 : 2 * i + 1], a = one, b = two;
            one = fmaf(a, c, -(b * s));
            two = fmaf(b, c, a * s);
        }
        warp_barrier();
    }

    STARFLOW_DEVICE float* scores(int row, int head) const {
        return floats(plan().scores) + (CLUSTERED ? row * spec().heads + head : warp()) * plan().slots;
    }

    // Returns the cache of one key-value head of one row: keys [head_dim / VECTOR][key_slots][VECTOR], of which the lanes
    // of a warp load one vector each, next to each other; then values [slots][value_dims].
    STARFLOW_DEVICE Weight* keys(int row, int index, int head) const {
        return cache() + int64_t(row) * plan().cache_row + (index * spec().kv_heads + head) * plan().cache_head;
    }

    // Returns the place of a value of the key in one of this thread block's slots.
    STARFLOW_DEVICE int key_place(int i, int slot) const {
        return (i / VECTOR * plan().key_slots + slot) * VECTOR + i % VECTOR;
    }

    // Computes the scores of one query with this thread block's share of the slots 0 .. slot.
    STARFLOW_DEVICE void score(const float* q, const Weight* keys, int slot, float scale, float* scores) const {
        for (int j = lane(); j * size() + rank() <= slot; j += WARP) {
            float score = 0;
            int whole = spec().head_dim / VECTOR * VECTOR;
            for (int i = 0; i < whole; i += VECTOR) {
                auto key = *reinterpret_cast<const Vector<Weight>*>(keys + key_place(i, j));
                STARFLOW_UNROLL
                for (int e = 0; e < VECTOR; ++e) score = fmaf(q[i + e], widen(key.values[e]), score);
            }
            for (int i = whole; i < spec().head_dim; ++i) score = fmaf(q[i], widen(keys[key_place(i, j)]), score);
            store(scores + j * size() + rank(), score * scale);
        }
    }

    // Computes the softmax of all scores, in every thread block, and this thread block's dimensions of the sum of
    // values.
    STARFLOW_DEVICE void weigh(float* scores, const Weight* values, int slot, float* out) const {
        float most = -INFINITY, total = 0;
        for (int s = lane(); s <= slot; s += WARP) most = fmaxf(most, scores[s]);
        most = warp_max(most);
        for (int s = lane(); s <= slot; s += WARP) {
            scores[s] = expf(scores[s] - most);
            total += scores[s];
        }
        total = warp_sum(total);
        warp_barrier();
        int begin = rank() * plan().value_dims;
        for (int i = lane(); i < plan().value_dims && begin + i < spec().head_dim; i += WARP) {
            float sum = 0;
            for (int s = 0; s <= slot; ++s) sum = fmaf(scores[s], widen(values[s * plan().value_dims + i]), sum);
            store(out + begin + i, sum / total);
        }
        warp_barrier();
    }

    // Stores this thread block's share of the rotated key and of the value of one head of a row.
    STARFLOW_DEVICE void append(const float* key, const float* value, int slot, Weight* keys, Weight* values) const {
        int begin = rank() * plan().value_dims;
        for (int i = lane(); i < spec().head_dim; i += WARP) {
            if (slot % size() == rank()) narrow(key[i], keys[key_place(i, slot / size())]);
            if (i >= begin && i < begin + plan().value_dims)
                narrow(value[i], values[slot * plan().value_dims + i - begin]);
        }
        warp_barrier();
    }

    // Attends. A warp takes a key-value head of one row, and its queries: q k v from `wide`, the result to `mid`.
    STARFLOW_DEVICE void attention(int index, int layer, int slot) const {
        int d = spec().head_dim, heads = spec().heads, kv_heads = spec().kv_heads, group = heads / kv_heads;
        auto weigh_head = [&](int row, int head) {
            const Weight* values = keys(row, index, head / group) + plan().key_values;
            weigh(scores(row, head), values, slot, mid(row) + head * d);
        };
        for (int item = warp(); item < rows * kv_heads; item += WARPS) {
            int row = item / kv_heads, kv_head = item % kv_heads;
            float *q = wide(row) + kv_head * group * d, *key = wide(row) + (heads + kv_head) * d;
            Weight* of = keys(row, index, kv_head);
            for (int j = 0; j < group; ++j) prepare(q + j * d, layer + plan().layer.q_norm, slot);
            prepare(key, layer + plan().layer.k_norm, slot);
            append(key, key + kv_heads * d, slot, of, of + plan().key_values);
            float scale = 1.0f / (sqrtf(float(d)) * (row < samples ? 1.0f : call.temperature));
            for (int j = 0; j < group; ++j) {
                int head = kv_head * group + j;
                score(q + j * d, of, slot, scale, scores(row, head));
                if constexpr (!CLUSTERED) weigh_head(row, head);
            }
        }
        if constexpr (CLUSTERED) {
            cluster_barrier();
            for (int item = warp(); item < rows * heads; item += WARPS) weigh_head(item / heads, item % heads);
        }
        barrier();
    }

    STARFLOW_DEVICE void feed_forward(int layer) const {
        const LayerPlaces& places = plan().layer;
        const float* x = normalized(places.mlp_norm, layer);
        int x_row = normalized_row();
        if (spec().mlp == Mlp::gelu) {
            multiply(places.up, layer, x, x_row,
                     [&](int row, int n, float value) { store(wide(row) + n, gelu(value)); });
        } else {
            multiply(places.gate, layer, x, x_row,
                     [&](int row, int n, float value) { wide(row)[n] = gelu_tanh(value); });
            // A thread has the same elements of both products.
            multiply(places.up, layer, x, x_row,
                     [&](int row, int n, float value) { store(wide(row) + n, wide(row)[n] * value); });
        }
        barrier();
        add_branch(places.down, layer, wide(0), plan().wide_row, places.mlp_post_norm, mid(0), plan().mid_row);
    }

    STARFLOW_DEVICE void network(int slot) const {
        int C = spec().channels;
        multiply(plan().proj_in, 0, token(0), plan().token_row, [&](int row, int n, float value) {
            if (call.positions) value += call.positions[int64_t(slot) * C + n];
            int64_t global_row = row / samples * call.B + first + row % samples;
            int64_t place = global_row * call.cond_slots + (call.cond_slots > 1 ? slot : 0);
            if (call.cond) value += call.cond[place * C + n];
            store(h(row) + n, value);
        });
        barrier();
        for (int i = 0; i < spec().layers; ++i) {
            int layer = plan().layers + i * plan().layer_bytes;
            const LayerPlaces& places = plan().layer;
            const float* x = normalized(places.attn_norm, layer);
            multiply(places.qkv, layer, x, normalized_row(),
                     [&](int row, int n, float value) { store(wide(row) + n, value); });
            barrier();
            attention(i, layer, slot);
            add_branch(places.proj, layer, mid(0), plan().mid_row, places.attn_post_norm, wide(0), plan().wide_row);
            feed_forward(layer);
        }
    }

    // Computes the parameters of the slot, to `wide`.
    STARFLOW_DEVICE void head() const {
        const float* x = h(0);
        int x_row = plan().h_row;
        if (spec().final_norm) {
            for (int row = warp(); row < rows; row += WARPS)
                rms_norm(h(row), floats(plan().final_norm), spec().channels, mid(row));
            block_barrier();
            x = mid(0), x_row = plan().mid_row;
        }
        multiply(plan().proj_out, 0, x, x_row, [&](int row, int n, float value) { store(wide(row) + n, value); });
        barrier();
    }

    // Computes x_t = mu + sigma z_t, the input of the next slot.
    STARFLOW_DEVICE void transform(int64_t t) const {
        int D = spec().token_dim;
        for (int item = rank() * THREADS + thread_index(); item < samples * D; item += size() * THREADS) {
            int sample = item / D, i = item % D;
            const float* without = call.guidance ? wide(samples + sample) : nullptr;
            float weight = call.guidance ? call.guidance[(first + sample) * call.T + t] : 0.0f;
            Gaussian g = gaussian(wide(sample), without, weight, i, D, call.rule, spec().affine);
            float* to = at(sample, t) + i;
            bool given = call.known && t < call.known[first + sample];
            float x = given ? *to : fmaf(g.sigma, *to, g.mu);
            call.log_sigma[to - call.state] = given ? 0.0f : g.log_sigma;
            *to = x;
            for (int row = sample; row < rows; row += samples) store(token(row) + i, x);
        }
        barrier();
    }

    STARFLOW_DEVICE void first_token() const {
        int D = spec().token_dim;
        for (int item = thread_index(); item < rows * D; item += THREADS) {
            int row = item / D, i = item % D;
            token(row)[i] = spec().start ? floats(plan().start)[i] : at(row % samples, 0)[i];
        }
        block_barrier();
    }

    STARFLOW_DEVICE void run() const {
        first_token();
        for (int slot = 0; slot < plan().slots; ++slot) {
            network(slot);
            head();
            transform(spec().start ? slot : slot + 1);
        }
    }
};

// Runs a thread block of the kernel: copies the weights once, then takes one group after the other. No thread block of
// a cluster returns before the last store to it, because a barrier follows every store.
template <class Weight, bool CACHED_ON_CHIP, bool CLUSTERED>
STARFLOW_DEVICE void run_onchip(const OnchipCall& call, char* shared) {
    const Plan& plan = call.plan;
    Cluster<CLUSTERED> cluster{plan.cluster};
    auto from = static_cast<const Quad<float>*>(call.weights) + cluster.rank() * (plan.weight_bytes / 16);
    auto to = reinterpret_cast<Quad<float>*>(shared);
    for (int i = thread_index(); i < plan.weight_bytes / 16; i += THREADS) to[i] = from[i];
    // The padding of a row is multiplied by zero weights, so it must be finite.
    for (int i = thread_index() + plan.activations / 4; i < plan.bytes / 4; i += THREADS)
        reinterpret_cast<float*>(shared)[i] = 0;
    cluster.barrier();
    int index = block_index() / cluster.size(), clusters = block_count() / cluster.size();
    for (int64_t first = int64_t(index) * plan.group; first < call.B; first += int64_t(clusters) * plan.group) {
        int samples = call.B - first < plan.group ? int(call.B - first) : plan.group;
        Onchip<Weight, CACHED_ON_CHIP, CLUSTERED>{cluster, call, shared, first, samples, samples * plan.copies}.run();
    }
}

}  // namespace starflow::cuda
