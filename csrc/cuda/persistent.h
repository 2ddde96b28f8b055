// The whole inverse of a flow block by one grid of thread blocks that stay resident. The products of a step share their
// outputs among all thread blocks, tile by tile. The weights of a thread block's tiles stream through a ring of stages
// in its shared memory. The ring runs ahead of the barriers between phases, since weights depend on nothing.
// Activations pass through device memory. float32 weights use float32 multiply-adds, bfloat16 weights the tensor cores,
// with activations rounded to bfloat16. Every sum is float32 and has one order for every number of rows and thread
// blocks: the eight warps of a thread block share the inputs of a product, and attention joins splits of fixed size.
#pragma once

#include "products.h"

namespace starflow::cuda {

// Loads eight values of the cache.
STARFLOW_DEVICE void load_eight(const float* from, float (&to)[8]) {
    auto low = reinterpret_cast<const Floats*>(from)[0], high = reinterpret_cast<const Floats*>(from)[1];
    STARFLOW_UNROLL
    for (int i = 0; i < 4; ++i) to[i] = low.values[i], to[4 + i] = high.values[i];
}
STARFLOW_DEVICE void load_eight(const Bf16* from, float (&to)[8]) {
    auto words = *reinterpret_cast<const Words*>(from);
    STARFLOW_UNROLL
    for (int i = 0; i < 4; ++i) {
        to[2 * i] = float_of(words.values[i] << 16);
        to[2 * i + 1] = float_of(words.values[i] & 0xffff0000u);
    }
}

template <class Weight, int ROWS>
struct Persistent : Products<Weight, ROWS> {
    using Base = Products<Weight, ROWS>;
    using Base::block, Base::blocks, Base::base, Base::call, Base::current, Base::counters, Base::fetch,
        Base::fetch_rounded, Base::fill, Base::first_tile, Base::floats, Base::for_outputs, Base::grid_barrier,
        Base::begin_stream, Base::lane, Base::multiply, Base::rounded, Base::rows, Base::schedule, Base::spec,
        Base::sum_of_warps, Base::warp, Base::x;

    using Base::Base;

    bool swapped = false;  // whether the states are in h_next

    // Returns null for a vector that the block does not have.
    STARFLOW_DEVICE const float* vectors(int layer, int at) const {
        return at < 0 ? nullptr : call.vectors + schedule().vector_layers + layer * schedule().layer_vectors + at;
    }

    STARFLOW_DEVICE float* states() const { return call.workspace + (swapped ? schedule().h_next : schedule().h); }

    // Sums value(row, i) over the channels i of each row. A warp takes every eighth group of 32 channels.
    template <class Value>
    STARFLOW_DEVICE void add_up(int which, Value value) const {
        for (int row = 0; row < rows(); ++row) {
            float sum = 0;
            for (int i = thread_index(); i < spec().channels; i += THREADS) sum += value(row, i);
            sum = warp_sum(sum);
            if (lane() == 0) floats(schedule().statistics)[(which * rows() + row) * WARPS + warp()] = sum;
        }
        block_barrier();
    }
    STARFLOW_DEVICE float mean(int which, int row) const {
        return sum_of_warps(floats(schedule().statistics) + (which * rows() + row) * WARPS, 1) / float(spec().channels);
    }

    // Fills x with the norm of the states. If there is a post-norm, adds the norm of the branch to the states before; each
    // thread block does so for all of them, and stores a share.
    STARFLOW_DEVICE void normalize(const Product& product, Norm kind, const float* weight, const float* bias,
                                   const float* post_norm) {
        float *h = floats(schedule().states), *branch = floats(schedule().branches);
        int C = spec().channels, row_floats = schedule().h_row;
        bool used = first_tile() < product.tiles;
        if (used || post_norm) {
            fetch(h, states(), rows() * row_floats);
            if (post_norm) fetch(branch, call.workspace + schedule().branch, rows() * row_floats);
            block_barrier();
        }
        if (post_norm) {
            swapped = !swapped;
            add_up(0, [&](int row, int i) { return branch[row * row_floats + i] * branch[row * row_floats + i]; });
            for (int row = 0; row < rows(); ++row) {
                float scale = 1.0f / sqrtf(mean(0, row) + 1e-6f);
                for (int i = thread_index(); i < C; i += THREADS) {
                    int at = row * row_floats + i;
                    h[at] += branch[at] * scale * (1.0f + post_norm[i]);
                    if (i / WARP % blocks == block) states()[at] = h[at];
                }
            }
        }
        if (!used) return;
        if (kind == Norm::none) {
            fill(product, [&](int row, int i) { return h[row * row_floats + i]; });
        } else if (kind == Norm::rms_norm) {
            add_up(1, [&](int row, int i) { return h[row * row_floats + i] * h[row * row_floats + i]; });
            fill(product, [&](int row, int i) {
                return h[row * row_floats + i] / sqrtf(mean(1, row) + 1e-6f) * (1.0f + weight[i]);
            });
        } else {
            add_up(1, [&](int row, int i) { return h[row * row_floats + i]; });
            add_up(0, [&](int row, int i) {
                float centered = h[row * row_floats + i] - mean(1, row);
                return centered * centered;
            });
            fill(product, [&](int row, int i) {
                float centered = h[row * row_floats + i] - mean(1, row);
                return fmaf(centered / sqrtf(mean(0, row) + 1e-5f), weight[i], bias[i]);
            });
        }
        block_barrier();
    }

    STARFLOW_DEVICE void normalize(const Product& product, int layer, const NormPlaces& places, const float* post) {
        normalize(product, spec().norm, vectors(layer, places.weight), vectors(layer, places.bias), post);
    }

    STARFLOW_DEVICE const float* post_norm(int layer, int at) const {
        return layer >= 0 && spec().post_norm ? vectors(layer, at) : nullptr;
    }

    STARFLOW_DEVICE void store_branch(const Product& product) {
        multiply(product, [&](int tile, auto sum) {
            for_outputs(product, tile, sum, [&](int row, int n, float value) {
                int at = row * schedule().h_row + n;
                if (spec().post_norm)
                    call.workspace[schedule().branch + at] = value;
                else
                    states()[at] += value;
            });
        });
        grid_barrier();
    }

    // Keys, then values, of one head of a row: [slots][head_row] each.
    STARFLOW_DEVICE Weight* cached(int layer, int row, int head) const {
        int64_t index = (int64_t(layer) * rows() + row) * spec().kv_heads + head;
        return static_cast<Weight*>(call.cache) + 2 * index * schedule().slots * schedule().head_row;
    }

    // The items of attention are splits of a row's key-value heads. Calls each(row, head, split) for those of this block.
    template <class Each>
    STARFLOW_DEVICE void for_splits(int slot, Each each) {
        int splits = slot / SPLIT + 1;
        for (int item = block; item < rows() * spec().kv_heads * splits; item += blocks)
            each(item / splits / spec().kv_heads, item / splits % spec().kv_heads, item % splits);
    }

    // Asks for the keys and values that attention will read. They are older than this step.
    STARFLOW_DEVICE void prefetch_cache(int layer, int slot) {
        constexpr int LINE = 128;
        for_splits(slot, [&](int row, int head, int split) {
            int left = slot - split * SPLIT, bytes = schedule().head_row * int(sizeof(Weight));
            for (int values = 0; values < 2; ++values) {
                int64_t first = int64_t(values) * schedule().slots + split * SPLIT;
                auto from = reinterpret_cast<const char*>(cached(layer, row, head) + first * schedule().head_row);
                for (int i = thread_index() * LINE; i < (left < SPLIT ? left : SPLIT) * bytes; i += THREADS * LINE)
                    prefetch(from + i);
            }
        });
    }

    // Norms and rotates the query or key of one head, by the lanes of a warp.
    STARFLOW_DEVICE void prepare(float* x, const float* norm, int slot) const {
        int d = spec().head_dim;
        if (spec().qk_norm) {
            rms_norm(x, norm, d, x);
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
    }

    STARFLOW_DEVICE void attend_split(int layer, int slot, int row, int head, int split) const {
        int d = spec().head_dim, size = schedule().head_row, group = spec().heads / spec().kv_heads;
        int splits = slot / SPLIT + 1, part_row = schedule().part_row, eights = size / 8;
        bool newest = split == splits - 1;
        float *q = floats(schedule().x), *key = q + group * size, *value = key + size, *sums = value + size;
        float *scores = sums + WARPS * size, *masses = scores + group * SPLIT;
        int* last = reinterpret_cast<int*>(masses + 2 * group);
        const float* given = call.workspace + schedule().qkv_out + row * schedule().qkv_row;
        for (int i = thread_index(); i < (group + 2) * size; i += THREADS) {
            int which = i / size, k = i % size, kv = (which - group) * spec().kv_heads + spec().heads + head;
            q[i] = k < d ? given[(which < group ? head * group + which : kv) * d + k] : 0.0f;
        }
        block_barrier();
        for (int j = warp(); j < group + 1; j += WARPS)
            prepare(q + j * size, vectors(layer, j < group ? schedule().layer.q_norm : schedule().layer.k_norm), slot);
        block_barrier();
        Weight *keys = cached(layer, row, head), *values = keys + int64_t(schedule().slots) * size;
        if (newest) {
            for (int i = thread_index(); i < size; i += THREADS) {
                narrow(key[i], keys[int64_t(slot) * size + i]);
                narrow(value[i], values[int64_t(slot) * size + i]);
            }
            block_barrier();
        }

        // Eight lanes share a key, and its value below.
        int first = split * SPLIT, own = warp() * 4 + lane() / 8;
        float scale = 1.0f / (sqrtf(float(d)) * (row < call.B ? 1.0f : call.temperature));
        for (int j = 0; j < group; ++j) {
            STARFLOW_UNROLL
            for (int s = own; s < SPLIT; s += 4 * WARPS) {
                float score = 0;
                if (first + s <= slot)
                    for (int c = lane() % 8; c < eights; c += 8) {
                        float eight[8];
                        load_eight(keys + int64_t(first + s) * size + 8 * c, eight);
                        STARFLOW_UNROLL
                        for (int i = 0; i < 8; ++i) score = fmaf(q[j * size + 8 * c + i], eight[i], score);
                    }
                STARFLOW_UNROLL
                for (int mask = 4; mask; mask /= 2) score += shuffle_xor(score, mask);
                if (lane() % 8 == 0) scores[j * SPLIT + s] = first + s <= slot ? score * scale : -INFINITY;
            }
        }
        block_barrier();
        for (int j = warp(); j < group; j += WARPS) {
            float most = -INFINITY, total = 0;
            for (int s = lane(); s < SPLIT; s += WARP) most = fmaxf(most, scores[j * SPLIT + s]);
            most = warp_max(most);
            for (int s = lane(); s < SPLIT; s += WARP) {
                scores[j * SPLIT + s] = expf(scores[j * SPLIT + s] - most);
                total += scores[j * SPLIT + s];
            }
            total = warp_sum(total);
            if (lane() == 0) masses[2 * j] = most, masses[2 * j + 1] = total;
        }
        block_barrier();
        int64_t at = (int64_t(row) * spec().heads + head * group) * schedule().splits;
        float* parts = call.workspace + schedule().parts + at * part_row;
        for (int j = 0; j < group; ++j) {
            for (int begin = 0; begin < eights; begin += 8) {
                int c = begin + lane() % 8;
                float sum[8];
                STARFLOW_UNROLL
                for (int i = 0; i < 8; ++i) sum[i] = 0;
                STARFLOW_UNROLL
                for (int s = own; s < SPLIT; s += 4 * WARPS)
                    if (c < eights && first + s <= slot) {
                        float eight[8];
                        load_eight(values + int64_t(first + s) * size + 8 * c, eight);
                        STARFLOW_UNROLL
                        for (int i = 0; i < 8; ++i) sum[i] = fmaf(scores[j * SPLIT + s], eight[i], sum[i]);
                    }
                STARFLOW_UNROLL
                for (int i = 0; i < 8; ++i) {
                    sum[i] += shuffle_xor(sum[i], 8);
                    sum[i] += shuffle_xor(sum[i], 16);
                    if (lane() < 8 && c < eights) sums[warp() * size + 8 * c + i] = sum[i];
                }
            }
            block_barrier();
            float* part = parts + (j * schedule().splits + split) * part_row;
            for (int i = thread_index(); i < part_row; i += THREADS)
                part[i] = i < 2 ? masses[2 * j + i] : sum_of_warps(sums + i - 2, size);
            block_barrier();
        }
        if (splits > 1) {
            if (thread_index() == 0) {
                int* done = counters() + 1 + row * spec().kv_heads + head;
                *last = count_up(done) == splits - 1;
                if (*last) *done = 0;
            }
            block_barrier();
            if (!*last) return;
        }
        // The last thread block to come joins the splits, always in the same order.
        for (int i = thread_index(); i < group * d; i += THREADS) {
            const float* part = parts + i / d * schedule().splits * part_row;
            float most = -INFINITY, total = 0, sum = 0;
            for (int s = 0; s < splits; ++s) most = fmaxf(most, part[s * part_row]);
            for (int s = 0; s < splits; ++s) {
                float weight = expf(part[s * part_row] - most);
                total = fmaf(weight, part[s * part_row + 1], total);
                sum = fmaf(weight, part[s * part_row + 2 + i % d], sum);
            }
            narrow(sum / total, rounded(schedule().mid)[row * schedule().mid_row + head * group * d + i]);
        }
    }

    // Fills x with the text state of a step, or with the token that the slot reads.
    STARFLOW_DEVICE void read_inputs(const Product& product, int64_t step) const {
        int D = spec().token_dim;
        int64_t slot = step - schedule().prefix, t = spec().start ? slot - 1 : slot;
        if (slot < 0)
            fill(product, [&](int row, int k) {
                return call.prefix[(int64_t(row) * schedule().prefix + step) * spec().text_dim + k];
            });
        else if (t < 0)
            fill(product, [&](int, int k) { return call.vectors[schedule().start + k]; });
        else
            fill(product, [&](int row, int k) { return call.state[place(int(row % call.B), t) * D + k]; });
        block_barrier();
    }

    // Returns the number of token t of a sample, counted in the block's own order, in the state.
    STARFLOW_DEVICE int64_t place(int sample, int64_t t) const {
        return sample * call.T + (spec().flip ? call.T - 1 - t : t);
    }

    STARFLOW_DEVICE void embed(int64_t step) {
        const Product& product = schedule().product(step, 0);
        int C = spec().channels;
        int64_t slot = step - schedule().prefix;
        read_inputs(product, step);
        multiply(product, [&](int tile, auto sum) {
            for_outputs(product, tile, sum, [&](int row, int n, float value) {
                if (slot >= 0 && call.positions) value += call.positions[slot * C + n];
                int64_t at = row * call.cond_slots + (call.cond_slots > 1 ? slot : 0);
                if (slot >= 0 && call.cond) value += call.cond[at * C + n];
                states()[row * schedule().h_row + n] = value;
            });
        });
        grid_barrier();
    }

    STARFLOW_DEVICE void run_layer(int layer, int slot) {
        const Schedule& plan = schedule();
        prefetch_cache(layer, slot);
        normalize(plan.qkv, layer, plan.layer.attn_norm, post_norm(layer - 1, plan.layer.mlp_post_norm));
        multiply(plan.qkv, [&](int tile, auto sum) {
            for_outputs(plan.qkv, tile, sum, [&](int row, int n, float value) {
                call.workspace[plan.qkv_out + row * plan.qkv_row + n] = value;
            });
        });
        grid_barrier();
        for_splits(slot, [&](int row, int head, int split) { attend_split(layer, slot, row, head, split); });
        grid_barrier();
        fetch_rounded(plan.project, plan.mid, plan.mid_row);
        store_branch(plan.project);
        normalize(plan.up, layer, plan.layer.mlp_norm, post_norm(layer, plan.layer.attn_post_norm));
        multiply(plan.up, [&](int tile, auto sum) {
            Weight* wide = rounded(plan.wide);
            if (spec().mlp == Mlp::gelu) {
                for_outputs(plan.up, tile, sum,
                            [&](int row, int n, float value) { narrow(gelu(value), wide[row * plan.wide_row + n]); });
            } else {
                int row = thread_index() / 4, i = thread_index() % 4, n = tile * 4 + i;
                if (row < rows() && n < spec().mlp_dim)
                    narrow(gelu_tanh(sum(row, i)) * sum(row, 4 + i), wide[row * plan.wide_row + n]);
            }
        });
        grid_barrier();
        fetch_rounded(plan.down, plan.wide, plan.wide_row);
        store_branch(plan.down);
    }

    // Computes the parameters of token t and from them x_t = mu + sigma z_t.
    STARFLOW_DEVICE void head(int64_t t) {
        const Product& product = schedule().head;
        bool unit = spec().affine.scale == Scale::unit;
        int D = spec().token_dim, width = unit ? TILE : TILE / 2;
        bool normed = spec().final_norm;
        normalize(product, normed ? Norm::rms_norm : Norm::none,
                  normed ? call.vectors + schedule().final_norm : nullptr, nullptr,
                  post_norm(spec().layers - 1, schedule().layer.mlp_post_norm));
        float* params = floats(schedule().statistics);
        multiply(product, [&](int tile, auto sum) {
            int item = thread_index(), sample = item / width, i = item % width, column = tile * width + i;
            if (item < rows() * TILE) params[item] = sum(item / TILE, item % TILE);
            block_barrier();
            if (sample >= call.B || column >= D) return;
            const float* without = call.guidance ? params + (call.B + sample) * TILE : nullptr;
            float weight = call.guidance ? call.guidance[sample * call.T + t] : 0.0f;
            Gaussian g = gaussian(params + sample * TILE, without, weight, i, width, call.rule, spec().affine);
            int64_t at = place(sample, t) * D + column;
            bool given = call.known && t < call.known[sample];
            call.log_sigma[at] = given ? 0.0f : g.log_sigma;
            if (!given) call.state[at] = fmaf(g.sigma, call.state[at], g.mu);
        });
        grid_barrier();
    }

    STARFLOW_DEVICE void run() {
        begin_stream();
        for (int slot = 0; slot < schedule().slots; ++slot) {
            base = 0;
            if (schedule().resident) current = 0;
            embed(slot);
            for (int layer = 0; layer < spec().layers; ++layer) run_layer(layer, slot);
            int64_t token = slot - schedule().prefix;
            if (token >= 0) head(spec().start ? token : token + 1);
            swapped = false;
        }
    }
};

// A kernel with room for a number of rows. A row has the same bits in each.
template <class W, int MOST_ROWS>
struct PersistentKernel {
    using Weight = W;
    static constexpr int ROWS = MOST_ROWS;

    STARFLOW_DEVICE static void run(const PersistentCall& call, char* shared) {
        Persistent<Weight, ROWS>(call, shared).run();
    }
};

// Calls start(kernel) with the smallest kernel that takes the rows of a call.
template <class Start>
void choose_persistent(const PersistentCall& call, Start start) {
    int rows = call.schedule.rows;
    if (call.spec.bf16)
        rows > 8 ? start(PersistentKernel<Bf16, 16>{}) : start(PersistentKernel<Bf16, 8>{});
    else if (rows > 8)
        start(PersistentKernel<float, 16>{});
    else
        rows > 2 ? start(PersistentKernel<float, 8>{}) : start(PersistentKernel<float, 2>{});
}

}  // namespace starflow::cuda
