// Scratch memory of the attention kernels, in floats per thread.
#pragma once

#include "workspace.h"

namespace starflow {

constexpr int64_t QUERIES = 16;  // queries, of all heads, per pass over the cache
constexpr int64_t CHAINS = 4;    // sums of values that are computed side by side
constexpr int64_t BLOCK = 64;    // tokens taken at a time

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

struct CachedScratch {
    float *q, *scores, *sums, *end;
    int64_t heads, width;  // key heads per pass; floats per row of scores

    CachedScratch(const AttentionCall& call, float* from) {
        int64_t queries = least(call.T * (call.H / call.H_kv), QUERIES);
        heads = least(QUERIES / queries, call.H_kv);
        int64_t rows = heads * queries;
        width = padded(call.S) + 2 * 16;
        q = from;
        scores = q + rows * padded(call.d);
        sums = scores + rows * width;
        end = sums + rows * CHAINS * padded(call.d);
    }
};

// Matrices of one head: rows of d values, padded, and their transposes in blocks of 64 tokens [d][64].
struct CausalScratch {
    float *k, *v, *k_across, *v_across;                      // all tokens
    float *q, *out, *grad_out, *q_across, *grad_out_across;  // a block of queries
    float *weights, *grad_scores;                            // (all keys, block of queries)
    float* room;                                             // a row of a narrower format
    float *grad_q, *grad_k, *grad_v, *end;

    CausalScratch(const AttentionCall& call, bool gradient, float* from) {
        int64_t width = padded(call.d), blocks = (call.T + BLOCK - 1) / BLOCK, tokens = blocks * BLOCK;
        auto take = [&](int64_t floats) {
            float* taken = from;
            from += floats;
            return taken;
        };
        k = take(tokens * width), v = take(tokens * width);
        k_across = take(tokens * width);
        q = take(BLOCK * width), out = take(BLOCK * width), q_across = take(BLOCK * width);
        weights = take(tokens * BLOCK), room = take(width);
        if (gradient) {
            v_across = take(tokens * width);
            grad_out = take(BLOCK * width), grad_out_across = take(BLOCK * width);
            grad_scores = take(tokens * BLOCK);
            grad_q = take(BLOCK * width), grad_k = take(tokens * width), grad_v = take(tokens * width);
        }
        end = from;
    }
};

inline int64_t cached_floats(const AttentionCall& call) {
    float* start = nullptr;
    return CachedScratch(call, start).end - start;
}

inline int64_t causal_floats(const AttentionCall& call, bool gradient) {
    float* start = nullptr;
    return CausalScratch(call, gradient, start).end - start;
}

}  // namespace starflow
