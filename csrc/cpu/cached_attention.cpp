// Attention of new tokens over the caller's KV cache. Memory is read once: each block of keys, then of values, serves
// all queries of a pass. A query's sums depend on its own position and window alone, so its bits are the same whatever
// the batch, the threads, and the tokens appended with it.
#include "attention_sizes.h"
#include "heads.h"
#include "lanes.h"

namespace starflow::STARFLOW_ISA {

namespace {

// Keys whose sums fit the registers.
constexpr int KEYS = ACCUMULATORS >= LANES ? LANES : ACCUMULATORS >= 4 ? 4 : 2;
constexpr int64_t AHEAD = 4096;  // bytes of a head that are fetched before they are used

INLINE void fetch(const float* row, int d) {
    for (int c = 0; c < d; c += LANES) __builtin_prefetch(row + c, 0, 2);
}

// Products of one query, padded with zeros, with sixteen keys.
INLINE Vec products(const float* q, const float* const (&key)[LANES], int d) {
    Vec sum[LANES];
    int whole = d / LANES * LANES;
    for (int first = 0; first < LANES; first += KEYS) {
        Vec part[KEYS];
        UNROLL for (int i = 0; i < KEYS; ++i) part[i] = splat(0.0f);
        for (int c = 0; c < whole; c += LANES) {
            Vec x = load(q + c);
            UNROLL for (int i = 0; i < KEYS; ++i) part[i] = fma(x, load(key[first + i] + c), part[i]);
        }
        if (whole < d) {
            Vec x = load(q + whole);
            UNROLL for (int i = 0; i < KEYS; ++i) part[i] = fma(x, load(key[first + i] + whole, d - whole), part[i]);
        }
        UNROLL for (int i = 0; i < KEYS; ++i) sum[first + i] = part[i];
    }
    return sums(sum);
}

// to[chain] (d,) += weight[s] value[s], s ascending by steps of N from `chain` on; count is a multiple of N.
template <int N, int COLUMNS>
INLINE void add_columns(const float* weight, const float* value, int64_t stride, int64_t count, int n, float* to,
                        int64_t width) {
    Vec sum[N][COLUMNS];
    UNROLL for (int i = 0; i < N; ++i)
        UNROLL for (int j = 0; j < COLUMNS; ++j) sum[i][j] = load(to + i * width + j * LANES);
    for (int64_t s = 0; s < count; s += N)
        UNROLL for (int i = 0; i < N; ++i) {
            const float* row = value + (s + i) * stride;
            Vec w = splat(weight[s + i]);
            UNROLL for (int j = 0; j < COLUMNS; ++j) sum[i][j] = fma(w, load(row + j * LANES, n - j * LANES), sum[i][j]);
        }
    UNROLL for (int i = 0; i < N; ++i)
        UNROLL for (int j = 0; j < COLUMNS; ++j) store(to + i * width + j * LANES, sum[i][j]);
}

template <int N>
void add_values(const float* weight, const float* value, int64_t stride, int64_t count, int d, float* to) {
    constexpr int MOST = ACCUMULATORS / N >= 4 ? 4 : 1;
    int64_t width = padded(d);
    int c = 0;
    for (; c + MOST * LANES <= d; c += MOST * LANES)
        add_columns<N, MOST>(weight, value + c, stride, count, MOST * LANES, to + c, width);
    for (; c < d; c += LANES) add_columns<N, 1>(weight, value + c, stride, count, d - c, to + c, width);
}

struct Pass {
    const AttentionCall& call;
    CachedScratch scratch;
    int64_t row, head, length, group;
    int64_t begin, queries;  // query i of the pass is that of token (begin + i) / group
    int64_t base, end;       // keys that the pass reads

    int64_t position(int64_t i) const { return length + (begin + i) / group; }
    float* scores(int64_t i) const { return scratch.scores + i * scratch.width; }

    void rotate_queries() const {
        for (int64_t i = 0; i < queries; ++i) {
            int64_t r = begin + i;
            rotated(call, call.q.at(row, r / group, head * group + r % group), position(i), 1,
                    scratch.q + i * padded(call.d));
        }
    }

    void multiply_keys() const {
        int64_t ahead = AHEAD / 4 / call.d / LANES * LANES + LANES;
        for (int64_t s = base; s < end; s += LANES) {
            const float* key[LANES];
            for (int i = 0; i < LANES; ++i) {
                key[i] = call.k_cache.at(row, s + i < end ? s + i : end - 1, head);
                if (s + i + ahead < end) fetch(call.k_cache.at(row, s + i + ahead, head), call.d);
            }
            for (int64_t i = 0; i < queries; ++i)
                store(scores(i) + s - base, products(scratch.q + i * padded(call.d), key, call.d));
        }
    }

    void sum_values() const {
        int64_t d = call.d, width = padded(d), stride = call.v_cache.token;
        float total[QUERIES];
        for (int64_t i = 0; i < queries; ++i) {
            int64_t low = call.first_key(position(i));
            total[i] = softmax(scores(i) + low - base, position(i) + 1 - low, call.scale);
        }
        memset(scratch.sums, 0, queries * CHAINS * width * sizeof(float));
        for (int64_t start = 0; base + start < end; start += BLOCK)
            for (int64_t i = 0; i < queries; ++i) {
                int64_t s = call.first_key(position(i)) + start, left = position(i) + 1 - s;
                int64_t count = left < BLOCK ? left : BLOCK, whole = count > 0 ? count / CHAINS * CHAINS : 0;
                if (left <= 0) continue;
                const float *weight = scores(i) + s - base, *value = call.v_cache.at(row, s, head);
                float* to = scratch.sums + i * CHAINS * width;
                add_values<CHAINS>(weight, value, stride, whole, d, to);
                for (int64_t j = whole; j < count; ++j)
                    add_values<1>(weight + j, value + j * stride, stride, 1, d, to + (j - whole) * width);
            }
        for (int64_t i = 0; i < queries; ++i) {
            const float* sum = scratch.sums + i * CHAINS * width;
            int64_t r = begin + i;
            float* out = call.out.at(row, r / group, head * group + r % group);
            for (int c = 0; c < d; c += LANES) {
                Vec even = load(sum + c) + load(sum + 2 * width + c);
                Vec odd = load(sum + width + c) + load(sum + 3 * width + c);
                store(out + c, (even + odd) * splat(1.0f / total[i]), d - c);
            }
        }
    }
};

}  // namespace

void cached_attention(const AttentionCall& call, int64_t first, int64_t last, float* floats) {
    CachedScratch scratch(call, floats);
    int64_t group = call.H / call.H_kv, queries = call.T * group;
    for (int64_t unit = first; unit < last; ++unit) {
        int64_t row = unit / call.H_kv, head = unit % call.H_kv, length = call.lengths[row];
        for (int64_t t = 0; t < call.T; ++t) {
            rotated(call, call.k.at(row, t, head), length + t, 1, call.k_cache.at(row, length + t, head));
            copy(call.v.at(row, t, head), call.d, call.v_cache.at(row, length + t, head));
        }
        for (int64_t begin = 0; begin < queries; begin += QUERIES) {
            Pass pass{call, scratch, row, head, length, group, begin};
            pass.queries = queries - begin < QUERIES ? queries - begin : QUERIES;
            pass.base = call.first_key(pass.position(0));
            pass.end = pass.position(pass.queries - 1) + 1;
            pass.rotate_queries();
            pass.multiply_keys();
            pass.sum_values();
        }
    }
}

}  // namespace starflow::STARFLOW_ISA
