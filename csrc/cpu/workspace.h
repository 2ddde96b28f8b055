// Memory in which a flow block keeps intermediate results. Nothing is allocated while it runs.
#pragma once

#include <algorithm>

#include "kernels.h"

namespace starflow {

constexpr int MOST_ROWS = 6;         // rows that a matrix product takes at a time
constexpr int MOST_QUERIES = 8;      // queries of one position that attention takes at a time
constexpr int SCRATCH_COLUMNS = 64;  // columns that a matrix product takes at a time

// Returns n rounded up to whole vectors, the padded size of a row of values.
inline int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

// Returns the floats of KV cache per row of `tokens` tokens.
inline int64_t cache_floats(const Spec& spec, int64_t tokens) {
    return spec.layers * spec.kv_heads * padded(tokens) * (spec.head_dim + padded(spec.head_dim));
}

// Returns the number of inputs of the widest product.
inline int64_t widest_input(const Spec& spec) {
    return std::max(
        {spec.token_dim, spec.text_dim, spec.channels, spec.heads * spec.head_dim, spec.mlp_dim, spec.transition_dim});
}

struct Workspace {
    float *h, *qkv, *attended, *hidden, *branch, *outer, *params;  // shared by the team
    float *normed, *tokens, *fresh, *spread, *outputs, *scratch, *rounded, *scores, *sums,
        *end;  // own memory of a thread

    // passed: tokens per pass, over all rows of a team. cached: slots of the KV cache.
    Workspace(const Spec& spec, int64_t passed, int64_t cached, float* shared, float* own) {
        auto take = [](float*& from, int64_t width, int64_t rows) {
            float* taken = from;
            from += padded(width) * rows;
            return taken;
        };
        float* start = shared;
        h = take(shared, spec.channels, passed);
        qkv = take(shared, spec.qkv_dim(), passed);
        attended = take(shared, int64_t(spec.heads) * spec.head_dim, passed);
        hidden = take(shared, spec.mlp_dim > spec.transition_dim ? spec.mlp_dim : spec.transition_dim, passed);
        branch = take(shared, spec.channels, passed);
        outer = take(shared, spec.adaptive ? spec.channels : 0, passed);
        params = take(shared, spec.params_dim(), passed);
        own += shared - start;
        normed = take(own, spec.channels, passed);
        tokens = take(own, spec.token_dim, passed);
        fresh = take(own, spec.token_dim, passed);
        spread = take(own, spec.token_dim, passed);
        outputs = take(own, 2 * padded(spec.token_dim), passed);
        scratch = take(own, SCRATCH_COLUMNS, passed);
        rounded = take(own, spec.rounded ? (widest_input(spec) + 1) / 2 : 0, passed);
        scores = take(own, cached, MOST_QUERIES);
        sums = take(own, spec.head_dim, MOST_QUERIES);
        end = own;
    }
};

// Returns the floats of workspace per thread.
inline int64_t workspace_floats(const Spec& spec, int64_t passed, int64_t cached) {
    float* start = nullptr;
    return Workspace(spec, passed, cached, start, start).end - start;
}

}  // namespace starflow
