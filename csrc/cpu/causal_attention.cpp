// Causal attention of one head at a time, and its gradient. The lanes of a vector are sixteen queries: scores are
// stored by key, so that maxima and sums over keys need no sums across lanes. Keys and queries are taken in blocks of
// 64, and tiles of 16 keys that no query sees are skipped.
#include "formats.h"
#include "heads.h"
#include "lanes.h"
#include "tiles.h"

namespace starflow::STARFLOW_ISA {

namespace {

INLINE int64_t tile_of(int64_t t) { return t / LANES * LANES; }

// Copies of the heads in the layouts that the products need, see CausalScratch.
struct Head {
    const AttentionCall& call;
    CausalScratch scratch;
    int64_t row, width;

    Head(const AttentionCall& call, bool gradient, float* floats, int64_t row)
        : call(call), scratch(call, gradient, floats), row(row), width(padded(call.d)) {}

    int64_t tokens(int64_t begin, int64_t most) const { return call.T - begin < most ? call.T - begin : most; }

    // Copies `count` tokens of a head from `begin` on to `rows`, rotated if `turn`, and their transpose to `across` if
    // that is not null.
    void load_rows(const Heads& from, int64_t head, int64_t begin, int64_t count, bool turn, float* rows,
                   float* across) const {
        for (int64_t t = 0; t < count; ++t) {
            const float* x = floats(from.data, call.format, from.index(row, begin + t, head), call.d, scratch.room);
            turn ? rotated(call, x, begin + t, 1, rows + t * width) : copy(x, call.d, rows + t * width);
        }
        if (across)
            for (int64_t t = 0; t < count; t += LANES)
                for (int64_t c = 0; c < width; c += LANES)
                    transpose(rows + t * width + c, width, across_at(across, t) + c * BLOCK, BLOCK);
    }

    // Returns the place of token t in a transpose.
    float* across_at(float* across, int64_t t) const { return across + t / BLOCK * BLOCK * width + t % BLOCK; }

    void store_row(const float* x, bool turn, const Heads& to, int64_t head, int64_t t) const {
        bool narrow = call.format != Format::float32;
        float* y = narrow ? scratch.room : to.at(row, t, head);
        turn ? rotated(call, x, t, -1, y) : copy(x, call.d, y);
        if (narrow) write(to.data, call.format, to.index(row, t, head), call.d, y);
    }

    // Sets first and last: query tiles first .. last - 1 of the block at `begin` see keys of the tile at `key`.
    void seen_by(int64_t key, int64_t begin, int64_t& first, int64_t& last) const {
        int64_t count = tokens(begin, BLOCK), end = call.window ? key + LANES - 1 + call.window : call.T;
        first = key > begin ? (key - begin) / LANES : 0;
        last = ((end < begin + count ? end - begin : count) + LANES - 1) / LANES;
    }

    // Computes to (keys, 64) = rows (keys, d) times the transpose of a block of 64 queries, where a query sees the key.
    void multiply_keys(float* across, const float* queries, int64_t begin, float* to) const {
        int64_t end = begin + tokens(begin, BLOCK), first, last;
        for (int64_t key = tile_of(call.first_key(begin)); key < end; key += LANES) {
            seen_by(key, begin, first, last);
            for (int64_t c = 0; c < call.d; c += BLOCK)
                multiply<true>(across_at(across, key) + c * BLOCK, queries + c * BLOCK + first * LANES, BLOCK,
                               call.d - c < BLOCK ? call.d - c : BLOCK, last - first, to + key * BLOCK + first * LANES,
                               BLOCK, c > 0);
        }
    }

    // Computes to (64 queries, d) = the transpose of weights (keys, 64) times rows (keys, d).
    void sum_over_keys(const float* weights, const float* rows, int64_t begin, float* to) const {
        int64_t end = begin + tokens(begin, BLOCK), start = tile_of(call.first_key(begin));
        for (int64_t block = start; block < end; block += BLOCK)
            for (int64_t query = begin; query < end; query += LANES) {
                int64_t first = tile_of(call.first_key(query)), last = query + tokens(query, LANES);
                bool add = first < block;
                if (add) first = block;
                if (last > block + BLOCK) last = block + BLOCK;
                if (first < last)
                    multiply<true>(weights + first * BLOCK + query - begin, rows + first * width, width, last - first,
                                   width / LANES, to + (query - begin) * width, width, add);
            }
    }

    // Adds weights (keys, 64) times rows (64 queries, d) to to (keys, d).
    void sum_over_queries(const float* weights, const float* rows, int64_t begin, float* to) const {
        int64_t count = tokens(begin, BLOCK), first, last;
        for (int64_t key = tile_of(call.first_key(begin)); key < begin + count; key += LANES) {
            seen_by(key, begin, first, last);
            first *= LANES, last = last * LANES < count ? last * LANES : count;
            multiply<false>(weights + key * BLOCK + first, rows + first * width, width, last - first, width / LANES,
                            to + key * width, width, true);
        }
    }

    // Calls each(key, position in `weights`, mask) for all keys in tiles that the sixteen queries from `query` on see.
    // The mask selects the queries that see the key.
    template <class Each>
    INLINE void for_keys(int64_t query, Each each) const {
        static const int32_t index[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        Int lane = load(index);
        int64_t at = query % BLOCK, partly = call.first_key(query + LANES - 1);
        int64_t key = tile_of(call.first_key(query));
        auto masked = [&](int64_t end) {
            for (; key < end; ++key) {
                int32_t distance = int32_t(query - key);  // of lane 0
                Int mask = splat(-distance - 1) < lane;
                if (call.window) mask = mask & (lane < splat(int32_t(call.window) - distance));
                each(key * BLOCK + at, mask);
            }
        };
        masked(partly < query ? partly : query);
        for (; key < query; ++key) each(key * BLOCK + at, splat(int32_t(-1)));
        masked(query + LANES);
    }
};

}  // namespace

void causal_attention(const AttentionCall& call, int64_t first, int64_t last, float* floats) {
    int64_t group = call.H / call.H_kv;
    for (int64_t unit = first; unit < last; ++unit) {
        Head head(call, false, floats, unit / call.H_kv);
        const CausalScratch& own = head.scratch;
        int64_t key_head = unit % call.H_kv;
        head.load_rows(call.k, key_head, 0, call.T, true, own.k, own.k_across);
        head.load_rows(call.v, key_head, 0, call.T, false, own.v, nullptr);
        for (int64_t h = key_head * group; h < (key_head + 1) * group; ++h)
            for (int64_t begin = 0; begin < call.T; begin += BLOCK) {
                int64_t count = head.tokens(begin, BLOCK);
                head.load_rows(call.q, h, begin, count, true, own.q, own.q_across);
                head.multiply_keys(own.k_across, own.q_across, begin, own.weights);
                float inverse[BLOCK], lse[BLOCK];
                for (int64_t i = 0; i < count; i += LANES) {
                    Vec top = splat(-INFINITY), total = splat(0.0f), scale = splat(call.scale);
                    head.for_keys(begin + i, [&](int64_t at, Int seen) __attribute__((always_inline)) {
                        Vec score = select(seen, load(own.weights + at) * scale, splat(-INFINITY));
                        store(own.weights + at, score);
                        top = max(top, score);
                    });
                    head.for_keys(begin + i, [&](int64_t at, Int) __attribute__((always_inline)) {
                        Vec weight = exp(load(own.weights + at) - top);
                        store(own.weights + at, weight);
                        total = total + weight;
                    });
                    store(inverse + i, splat(1.0f) / total);
                    store(lse + i, top + log(total));
                }
                head.sum_over_keys(own.weights, own.v, begin, own.out);
                memcpy(call.lse + (head.row * call.H + h) * call.T + begin, lse, count * sizeof *lse);
                for (int64_t t = 0; t < count; ++t) {
                    float* out = own.out + t * head.width;
                    for (int c = 0; c < call.d; c += LANES) store(out + c, load(out + c) * splat(inverse[t]));
                    head.store_row(out, false, call.out, h, begin + t);
                }
            }
    }
}

void causal_attention_backward(const AttentionCall& call, int64_t first, int64_t last, float* floats) {
    int64_t group = call.H / call.H_kv;
    for (int64_t unit = first; unit < last; ++unit) {
        Head head(call, true, floats, unit / call.H_kv);
        const CausalScratch& own = head.scratch;
        int64_t key_head = unit % call.H_kv;
        head.load_rows(call.k, key_head, 0, call.T, true, own.k, own.k_across);
        head.load_rows(call.v, key_head, 0, call.T, false, own.v, own.v_across);
        memset(own.grad_k, 0, padded(call.T) * head.width * sizeof(float));
        memset(own.grad_v, 0, padded(call.T) * head.width * sizeof(float));
        for (int64_t h = key_head * group; h < (key_head + 1) * group; ++h)
            for (int64_t begin = 0; begin < call.T; begin += BLOCK) {
                int64_t count = head.tokens(begin, BLOCK), at_lse = (head.row * call.H + h) * call.T + begin;
                head.load_rows(call.q, h, begin, count, true, own.q, own.q_across);
                if (call.grad_out.data)
                    head.load_rows(call.grad_out, h, begin, count, false, own.grad_out, own.grad_out_across);
                head.multiply_keys(own.k_across, own.q_across, begin, own.weights);
                head.multiply_keys(own.v_across, own.grad_out_across, begin, own.grad_scores);
                for (int64_t i = 0; i < count; i += LANES) {
                    int left = int(count - i);
                    Vec lse = load(call.lse + at_lse + i, left), scale = splat(call.scale), mean = splat(0.0f);
                    // Compute rowsum(dO O) as the mean of dP: the rounding errors of dP then cancel in the difference.
                    head.for_keys(begin + i, [&](int64_t at, Int seen) __attribute__((always_inline)) {
                        Vec score = load(own.weights + at) * scale - lse;
                        Vec weight = exp(select(seen, score, splat(-INFINITY)));
                        store(own.weights + at, weight);
                        mean = fma(weight, load(own.grad_scores + at), mean);
                    });
                    if (call.grad_lse) mean = mean - load(call.grad_lse + at_lse + i, left);
                    head.for_keys(begin + i, [&](int64_t at, Int) __attribute__((always_inline)) {
                        Vec weight = load(own.weights + at) * scale;
                        store(own.grad_scores + at, weight * (load(own.grad_scores + at) - mean));
                    });
                }
                head.sum_over_keys(own.grad_scores, own.k, begin, own.grad_q);
                head.sum_over_queries(own.grad_scores, own.q, begin, own.grad_k);
                if (call.grad_out.data) head.sum_over_queries(own.weights, own.grad_out, begin, own.grad_v);
                for (int64_t t = 0; t < count; ++t)
                    head.store_row(own.grad_q + t * head.width, true, call.grad_q, h, begin + t);
            }
        for (int64_t t = 0; t < call.T; ++t) {
            head.store_row(own.grad_k + t * head.width, true, call.grad_k, key_head, t);
            head.store_row(own.grad_v + t * head.width, false, call.grad_v, key_head, t);
        }
    }
}

}  // namespace starflow::STARFLOW_ISA
