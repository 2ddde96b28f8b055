// Products of the persistent inverse: a thread block's share of the tiles, whose weights stream through a ring of stages in
// its shared memory.
#pragma once

#include "elementary.h"
#include "persistent_launch.h"
#include "stream.h"

namespace starflow::cuda {

struct alignas(16) Words {
    uint32_t values[4];
};

struct alignas(16) Floats {
    float values[4];
};

// Weight: type of weights, cache and rounded activations, float or Bf16. ROWS: rows that registers have room for.
template <class Weight, int ROWS>
struct Products {
    const PersistentCall& call;
    char* shared;
    int block, blocks;
    int passed = 0;               // grid barriers
    int current = 0, parity = 0;  // stage that is consumed next, and the parity of its copy
    int base = 0;                 // thread block of the first tile of the current product
    // The next stage to request: step, product, tile, first warp step within the tile, thread block of the product's
    // first tile; and its place in the ring.
    int64_t next_step = 0;
    int next_product = 0, next_tile = 0, next_depth = 0, next_base = 0, next_stage = 0;

    STARFLOW_DEVICE Products(const PersistentCall& call, char* shared)
        : call(call), shared(shared), block(block_index()), blocks(call.blocks) {}

    STARFLOW_DEVICE const Spec& spec() const { return call.spec; }
    STARFLOW_DEVICE const Schedule& schedule() const { return call.schedule; }
    STARFLOW_DEVICE float* floats(int offset) const { return reinterpret_cast<float*>(shared + offset); }
    STARFLOW_DEVICE static int lane() { return thread_index() % WARP; }
    STARFLOW_DEVICE static int warp() { return thread_index() / WARP; }
    STARFLOW_DEVICE int rows() const { return schedule().rows; }
    STARFLOW_DEVICE Weight* x() const { return reinterpret_cast<Weight*>(shared + schedule().x); }
    STARFLOW_DEVICE Weight* rounded(int64_t at) const { return reinterpret_cast<Weight*>(call.workspace + at); }
    STARFLOW_DEVICE Arrival* arrival(int stage) const {
        return reinterpret_cast<Arrival*>(shared + schedule().barriers) + stage;
    }
    STARFLOW_DEVICE int* counters() const { return reinterpret_cast<int*>(call.workspace + schedule().counters); }

    // Waits until all thread blocks have come this far. What they have written before is visible behind it.
    STARFLOW_DEVICE void grid_barrier() {
        ++passed;
        block_barrier();
        if (thread_index() == 0) {
            count_up(counters());
            wait_for_count(counters(), passed * blocks);
        }
        block_barrier();
    }

    STARFLOW_DEVICE void find_next_tile() {
        while (next_step < schedule().slots) {
            int tiles = schedule().product(next_step, next_product).tiles;
            if (next_tile < tiles) return;
            next_base = (next_base + tiles) % blocks;
            if (++next_product == schedule().products(next_step)) next_product = 0, next_base = 0, ++next_step;
            next_tile = (block - next_base + blocks) % blocks;
        }
    }

    // Requests the next stage, if there is one, in the place of one that all threads have left.
    STARFLOW_DEVICE void request() {
        if (next_step >= schedule().slots) return;
        const Product& product = schedule().product(next_step, next_product);
        int left = product.steps - next_depth, steps = left < schedule().stage_steps ? left : schedule().stage_steps;
        const char* from = call.weights + schedule().weights_at(next_step, next_product) +
                           next_tile * product.tile_bytes() + next_depth * STEP_BYTES;
        int bytes = steps * STEP_BYTES + (steps == left ? BIAS_BYTES : 0);
        copy_in_background(arrival(next_stage), stage(next_stage), from, bytes);
        next_stage = next_stage + 1 == schedule().stages ? 0 : next_stage + 1;
        next_depth += steps;
        if (steps == left) {
            next_depth = 0, next_tile += blocks;
            find_next_tile();
        }
    }

    STARFLOW_DEVICE char* stage(int index) const { return shared + schedule().ring + index * schedule().stage_bytes(); }

    STARFLOW_DEVICE void begin_stream() {
        if (thread_index() == 0)
            for (int i = 0; i < schedule().stages; ++i) begin_arrivals(arrival(i));
        block_barrier();
        next_tile = block;
        find_next_tile();
        for (int i = 0; i < schedule().stages && (next_step == 0 || !schedule().resident); ++i) request();
    }

    STARFLOW_DEVICE void leave_stage() {
        // If all weights fit, they stay, and every step finds them in the same stages.
        if (!schedule().resident) request();
        if (++current == schedule().stages) current = 0, parity ^= int(!schedule().resident);
    }

    STARFLOW_DEVICE int first_tile() const { return (block - base + blocks) % blocks; }

    // Adds the products of this warp's steps of one stage to sums. The stage holds steps first .. first + count - 1.
    template <int COUNT>
    STARFLOW_DEVICE void multiply_stage(const char* weights, int first, int count, float (&sums)[COUNT]) const {
        if constexpr (sizeof(Weight) == sizeof(Bf16)) {
            int g = lane() / 4, t = lane() % 4 * 2;
            const Weight* low = x() + (g < rows() ? g : rows() - 1) * schedule().x_row + t;
            const Weight* high = x() + (g + 8 < rows() ? g + 8 : rows() - 1) * schedule().x_row + t;
            auto pair = [](const Weight* from) { return *reinterpret_cast<const uint32_t*>(from); };
            for (int step = warp(); step < count; step += WARPS) {
                auto fragments = reinterpret_cast<const Words*>(weights + step * STEP_BYTES)[lane()];
                STARFLOW_UNROLL
                for (int half = 0; half < 2; ++half) {
                    int k = (first + step) * 32 + half * 16;
                    uint32_t a[4] = {pair(low + k), 0, pair(low + k + 8), 0};
                    if constexpr (ROWS > 8) a[1] = pair(high + k), a[3] = pair(high + k + 8);
                    uint32_t b[2] = {fragments.values[2 * half], fragments.values[2 * half + 1]};
                    multiply_add(a, b, sums);
                }
            }
        } else {
            int quarter = lane() / 8 * 4;
            for (int step = warp(); step < count; step += WARPS) {
                auto weight = reinterpret_cast<const Floats*>(weights + step * STEP_BYTES)[lane()];
                int k = (first + step) * 16 + quarter;
                STARFLOW_UNROLL
                for (int row = 0; row < ROWS; ++row) {
                    const Weight* from = x() + (row < rows() ? row : rows() - 1) * schedule().x_row + k;
                    auto value = *reinterpret_cast<const Floats*>(from);
                    STARFLOW_UNROLL
                    for (int i = 0; i < 4; ++i) sums[row] = fmaf(value.values[i], weight.values[i], sums[row]);
                }
            }
        }
    }

    // Stores this warp's sums of a tile to `to` [rows][TILE]. The first warp adds the biases.
    template <int COUNT>
    STARFLOW_DEVICE void store_sums(float (&sums)[COUNT], const float* biases, float* to) const {
        auto bias = [&](int n) { return warp() == 0 ? biases[n] : 0.0f; };
        if constexpr (sizeof(Weight) == sizeof(Bf16)) {
            int g = lane() / 4, t = lane() % 4 * 2;
            STARFLOW_UNROLL
            for (int i = 0; i < 4; ++i) {
                int row = g + i / 2 * 8, n = t + i % 2;
                if (row < rows()) to[row * TILE + n] = sums[i] + bias(n);
            }
        } else {
            STARFLOW_UNROLL
            for (int row = 0; row < ROWS; ++row) {
                sums[row] += shuffle_xor(sums[row], 8);
                sums[row] += shuffle_xor(sums[row], 16);
                if (lane() < TILE && row < rows()) to[row * TILE + lane()] = sums[row] + bias(lane());
            }
        }
    }

    // Multiplies the inputs in x by this thread block's tiles. Calls done(tile, sum) with sum(row, n) = (x W^T + b)[row,
    // TILE tile + n].
    template <class Done>
    STARFLOW_DEVICE void multiply(const Product& product, Done done) {
        int turn = 0;
        for (int tile = first_tile(); tile < product.tiles; tile += blocks, turn ^= 1) {
            constexpr int COUNT = sizeof(Weight) == sizeof(Bf16) ? 4 : ROWS;
            float sums[COUNT];
            STARFLOW_UNROLL
            for (int i = 0; i < COUNT; ++i) sums[i] = 0;
            int size = WARPS * rows() * TILE;
            float* all = floats(schedule().sums) + turn * size;
            for (int first = 0; first < product.steps; first += schedule().stage_steps) {
                int left = product.steps - first, count = left < schedule().stage_steps ? left : schedule().stage_steps;
                wait_for_copy(arrival(current), parity);
                multiply_stage(stage(current), first, count, sums);
                if (count == left)
                    store_sums(sums, reinterpret_cast<const float*>(stage(current) + count * STEP_BYTES),
                               all + warp() * rows() * TILE);
                block_barrier();
                leave_stage();
            }
            done(tile, [&](int row, int n) { return sum_of_warps(all + row * TILE + n, rows() * TILE); });
        }
        base = (base + product.tiles) % blocks;
    }

    STARFLOW_DEVICE static float sum_of_warps(const float* from, int distance) {
        float sums[4];
        STARFLOW_UNROLL
        for (int i = 0; i < 4; ++i) sums[i] = from[2 * i * distance] + from[(2 * i + 1) * distance];
        return (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }

    // Calls each(row, n, sum) for the outputs n of a tile.
    template <class Sum, class Each>
    STARFLOW_DEVICE void for_outputs(const Product& product, int tile, Sum sum, Each each) const {
        int row = thread_index() / TILE, n = tile * TILE + thread_index() % TILE;
        if (row < rows() && n < product.out) each(row, n, sum(row, thread_index() % TILE));
    }

    // Fills x with value(row, k), and zeros up to the next multiple of a warp's step.
    template <class Value>
    STARFLOW_DEVICE void fill(const Product& product, Value value) const {
        int depth = product.steps * step_depth(spec());
        for (int row = 0; row < rows(); ++row)
            for (int k = thread_index(); k < depth; k += THREADS)
                narrow(k < product.in ? value(row, k) : 0.0f, x()[row * schedule().x_row + k]);
    }

    // Copies `count` floats, a multiple of four, to shared memory.
    STARFLOW_DEVICE static void fetch(float* to, const float* from, int count) {
        constexpr int AT_ONCE = 4;
        for (int i = thread_index(); i < count / 4; i += AT_ONCE * THREADS) {
            Floats values[AT_ONCE];
            STARFLOW_UNROLL
            for (int j = 0; j < AT_ONCE; ++j)
                if (i + j * THREADS < count / 4) values[j] = reinterpret_cast<const Floats*>(from)[i + j * THREADS];
            STARFLOW_UNROLL
            for (int j = 0; j < AT_ONCE; ++j)
                if (i + j * THREADS < count / 4) reinterpret_cast<Floats*>(to)[i + j * THREADS] = values[j];
        }
    }

    // Copies rows of rounded values from the workspace to x.
    STARFLOW_DEVICE void fetch_rounded(const Product& product, int64_t at, int row_values) const {
        if (first_tile() < product.tiles)
            for (int row = 0; row < rows(); ++row)
                fetch(reinterpret_cast<float*>(x() + row * schedule().x_row),
                      reinterpret_cast<const float*>(rounded(at) + row * row_values),
                      row_values * int(sizeof(Weight)) / 4);
        block_barrier();
    }
};

}  // namespace starflow::cuda
