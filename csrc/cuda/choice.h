// Choice of the plan of an on-chip inverse: the one with the shortest estimated time for all samples.
#pragma once

#include <cmath>

#include "plan.h"

namespace starflow::cuda {

constexpr int LANES = THREADS / WARPS;
// Estimates for an H200, in cycles; no GPU has measured them yet.
constexpr double CYCLES_PER_SECOND = 1.7e9;
constexpr int BARRIER = 40, CLUSTER_BARRIER = 400;
constexpr int LATENCY = 50;                 // of loads from shared memory and the multiply-adds that wait for them
constexpr int MEMORY_LATENCY = 900;         // of loads from device memory
constexpr int MEMORY_BYTES = 18;            // of device memory per cycle and multiprocessor
constexpr int MULTIPLY_ADD = 4;             // one that waits for the one before
constexpr int REDUCTION = 150;              // sum or maximum of a warp
constexpr int STORE = 1, REMOTE_STORE = 6;  // 32 values, to one thread block

inline int64_t longest(int64_t a, int64_t b) { return a > b ? a : b; }

// Estimates the cycles of a token step of the groups of a plan, with `rows` rows in each.
class StepTime {
public:
    StepTime(const Spec& spec, const Plan& plan, int64_t rows) : spec(spec), plan(plan), rows(rows) {}

    int64_t cycles() const {
        const LayerPlaces& places = plan.layer;
        int64_t layer = product(places.qkv) + product(places.proj) + product(places.up) + product(places.down);
        if (spec.mlp == Mlp::swiglu) layer += product(places.gate);
        layer += attention() + 5 * barrier();
        layer += (spec.norm == Norm::none ? 0 : 2) * norm() + (spec.post_norm ? 2 : 0) * (norm() + barrier());
        int64_t ends = product(plan.proj_in) + product(plan.proj_out) + (spec.final_norm ? norm() : 0) + 3 * barrier();
        return ends + spec.layers * layer;
    }

private:
    const Spec& spec;
    const Plan& plan;
    int64_t rows;

    bool clustered() const { return plan.cluster > 1; }
    int64_t barrier() const { return clustered() ? CLUSTER_BARRIER : BARRIER; }
    int64_t norm() const {
        return divided_up(rows, WARPS) * (2 * REDUCTION + spec.channels / LANES * LATENCY / 2) + BARRIER;
    }

    // The warps work in rounds. In each step of a round, a warp waits for its loads, or for those of the others.
    int64_t product(const Dense& dense) const {
        if (!dense.out) return 0;
        int64_t share = dense.share < dense.out ? dense.share : dense.out;
        int tile = tile_rows(rows, dense.share, spec.bf16), columns = spec.bf16 ? 16 : LANES;
        int64_t warps = divided_up(divided_up(rows, tile) * share, columns), depth = divided_up(dense.in, columns);
        // Shared memory gives 128 bytes per cycle: fragments of 512 bytes, and as much per 8 rows; or 4 values of
        // the weights per lane and of each row.
        int64_t loads = spec.bf16 ? 4 + tile / 2 : 4 + tile, sums = spec.bf16 ? 0 : tile * MULTIPLY_ADD / 4;
        if (!spec.bf16) depth = divided_up(dense.in, 4);
        int64_t busy = warps < WARPS ? warps : WARPS, step = longest(LATENCY, busy * longest(loads, sums));
        int64_t stores = divided_up(rows * share, LANES) * (clustered() ? REMOTE_STORE * plan.cluster : STORE);
        return divided_up(warps, WARPS) * depth * step + stores;
    }

    // Attention of an average step, over half of the slots.
    int64_t attention() const {
        int64_t slots = divided_up(plan.slots, 2), own = divided_up(plan.key_slots, 2), d = spec.head_dim;
        int64_t queries = spec.heads / spec.kv_heads, items = rows * spec.kv_heads, heads = rows * spec.heads;
        int64_t vector = spec.bf16 ? 8 : 4, wait = plan.cached_on_chip ? LATENCY : MEMORY_LATENCY;
        auto shared = [](int64_t warps, int64_t chain, int64_t loads) {
            return longest(chain, (warps < WARPS ? warps : WARPS) * loads);
        };
        // A lane takes a slot: its key in vectors, and each value of the query.
        int64_t score =
            divided_up(own, LANES) * (wait + shared(items, d * MULTIPLY_ADD, d + 4 * divided_up(d, vector)));
        // A lane takes a dimension: the value of each slot, and its weight.
        int64_t softmax = 2 * REDUCTION + divided_up(slots, LANES) * LATENCY;
        int64_t sum = divided_up(plan.value_dims, LANES) * (wait + shared(heads, slots * MULTIPLY_ADD, 2 * slots));
        int64_t scores = divided_up(items, WARPS) * (REDUCTION + queries * score);
        int64_t sums = (clustered() ? divided_up(heads, WARPS) : divided_up(items, WARPS) * queries) * (softmax + sum);
        int64_t time = scores + sums + (clustered() ? CLUSTER_BARRIER : 0);
        if (plan.cached_on_chip) return time;
        int64_t bytes = rows * plan.cache_row / spec.layers / 2 * (spec.bf16 ? 2 : 4);
        return longest(time, bytes / MEMORY_BYTES);
    }
};

// Returns the estimated nanoseconds of a token step of a plan with full groups.
inline int64_t step_nanoseconds(const Spec& spec, const Plan& plan) {
    return int64_t(1e9 / CYCLES_PER_SECOND * double(StepTime(spec, plan, plan.group * plan.copies).cycles()));
}

// Returns the plan that takes the least time for B samples, that is (groups in a row) x (time of a step), with `limit`
// bytes of shared memory per thread block and clusters of up to `most_cluster`. More thread blocks per cluster hold more
// rows, since they share the weights, and take longer to wait for each other. Of equal plans the smaller cluster is
// taken, then the one with its KV cache on chip, then the larger group. The group is 0 if not even one sample fits.
inline Plan choose_plan(const Spec& spec, int64_t T, int copies, int64_t B, int64_t limit, int64_t processors,
                        int most_cluster) {
    Plan best{};
    double least = INFINITY;
    int cluster = 1;
    for (;; cluster *= 2) {
        int64_t clusters = processors / cluster, most = MOST_ROWS / copies;
        int64_t share = longest(1, divided_up(B, clusters));
        for (bool cached_on_chip : {true, false})
            for (int group = int(share < most ? share : most); group > 0; --group) {
                Plan plan = make_plan(spec, T, copies, group, cached_on_chip, cluster);
                if (plan.bytes > limit) continue;
                double time = double(divided_up(share, group)) * double(step_nanoseconds(spec, plan));
                if (time < least) least = time, best = plan;
            }
        if (2 * cluster > most_cluster || 2 * cluster > processors || cluster == MOST_CLUSTER) break;
    }
    return best.group ? best : make_plan(spec, T, copies, 0, false, cluster);
}

}  // namespace starflow::cuda
