// Attention of new tokens over the caller's KV cache. Memory is read once: each block of keys, then of values, serves
// all queries of a pass. A query's sums depend on its own position and window alone, so its bits are the same whatever
// the batch, the threads, and the tokens appended with it.
#include "attention_sizes.h"
#include "heads.h"
#include "lanes.h"

namespace starflow::STARFLOW_ISA {

namespace {

// Number of keys whose products fit into the registers.
constexpr int KEYS = ACCUMULATORS >= 8 ? 8 : ACCUMULATORS >= 4 ? 4 : 2;
constexpr int64_t AHEAD = 256;  // floats that are fetched before they are used, in units of sixteen keys

// Returns the products of one query, padded with zeros, with sixteen keys.
INLINE Vec products(const float* q, const float* const (&key)[LANES], int d) {
    Vec sum[LANES];
    int whole = d / LANES * LANES;
    for (int first = 0; first < LANES; first += KEYS) {
        Vec part[KEYS];
        UNROLL
        for (int i = 0; i < KEYS; ++i) part[i] = splat(0.0f);
        for (int c = 0; c < whole; c += LANES) {
            Vec x = load(q + c);
            UNROLL
            for (int i = 0; i < KEYS; ++i) part[i] = fma(x, load(key[first + i] + c), part[i]);
        }
        if (whole < d) {
            Vec x = load(q + whole);
            UNROLL
            for (int i = 0; i < KEYS; ++i) part[i] = fma(x, load(key[first + i] + whole, d - whole), part[i]);
        }
        UNROLL
        for (int i = 0; i < KEYS; ++i) sum[first + i] = part[i];
    }
    return sums(sum);
}

// Adds weight[s] value[s] to to[chain] (d,) for s = chain, chain + N, ... < count; count is a multiple of N.
template <int N, int COLUMNS>
INLINE void add_columns(const float* weight, const float* value, int64_t stride, int64_t count, int n, float* to,
                        int64_t width) {
    Vec sum[N][COLUMNS];
    UNROLL
    for (int i = 0; i < N; ++i) {
        UNROLL
        for (int j = 0; j < COLUMNS; ++j) sum[i][j] = load(to + i * width + j * LANES);
    }
    for (int64_t s = 0; s < count; s += N) {
        UNROLL
        for (int i = 0; i < N; ++i) {
            const float* row = value + (s + i) * stride;
            Vec w = splat(weight[s + i]);
            UNROLL
            for (int j = 0; j < COLUMNS; ++j) sum[i][j] = fma(w, load(row + j * LANES, n - j * LANES), sum[i][j]);
        }
    }
    UNROLL
    for (int i = 0; i < N; ++i) {
        UNROLL
        for (int j = 0; j < COLUMNS; ++j) store(to + i * width + j * LANES, sum[i][j]);
    }
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

// Some queries of some key heads of one row. The keys of these heads are adjacent in memory and are read together.
struct Pass {
    const AttentionCall& call;
    CachedScratch scratch;
    int64_t row, head, heads;       // key heads head .. head + heads - 1
    int64_t group, begin, queries;  // query i of a key head belongs to token (begin + i) / group
    int64_t base, end;              // keys that the pass reads

    int64_t position(int64_t i) const { return call.lengths[row] + (begin + i) / group; }
    float* query(int64_t h, int64_t i) const { return scratch.q + (h * queries + i) * padded(call.d); }
    float* scores(int64_t h, int64_t i) const { return scratch.scores + (h * queries + i) * scratch.width; }
    float* sums_of(int64_t h, int64_t i) const { return scratch.sums + (h * queries + i) * CHAINS * padded(call.d); }

    const float* at(const Heads& from, int64_t h, int64_t i) const {
        return from.at(row, (begin + i) / group, (head + h) * group + (begin + i) % group);
    }

    // Prefetches the keys or values of the tokens s .. s + count - 1.
    void fetch(const Heads& cache, int64_t h, int64_t s, int64_t count) const {
        for (int64_t i = s; i < s + count && i < end; ++i)
            for (int c = 0; c < call.d; c += LANES) __builtin_prefetch(cache.at(row, i, head + h) + c, 0, 2);
    }

    template <class Each>
    INLINE void for_queries(Each each) const {
        for (int64_t h = 0; h < heads; ++h)
            for (int64_t i = 0; i < queries; ++i) each(h, i);
    }

    void rotate_queries() const {
        for_queries([&](int64_t h, int64_t i) { rotated(call, at(call.q, h, i), position(i), 1, query(h, i)); });
    }

    void multiply_keys() const {
        int64_t ahead = (AHEAD / heads / call.d + 1) * LANES;
        for (int64_t s = base; s < end; s += LANES) {
            const float* key[LANES];
            for_queries([&](int64_t h, int64_t i) __attribute__((always_inline)) {
                if (i == 0) {
                    fetch(call.k_cache, h, s + ahead, LANES);
                    for (int l = 0; l < LANES; ++l)
                        key[l] = call.k_cache.at(row, s + l < end ? s + l : end - 1, head + h);
                }
                store(scores(h, i) + s - base, products(query(h, i), key, call.d));
            });
        }
    }

    void sum_values() const {
        int64_t d = call.d, width = padded(d), stride = call.v_cache.token;
        float total[QUERIES];
        for_queries([&](int64_t h, int64_t i) {
            int64_t low = call.first_key(position(i));
            total[h * queries + i] = softmax(scores(h, i) + low - base, position(i) + 1 - low, call.scale);
        });
        memset(scratch.sums, 0, heads * queries * CHAINS * width * sizeof(float));
        for (int64_t start = 0; base + start < end; start += BLOCK)
            for_queries([&](int64_t h, int64_t i) {
                if (i == 0) fetch(call.v_cache, h, base + start + BLOCK, BLOCK);
                int64_t s = call.first_key(position(i)) + start, left = position(i) + 1 - s;
                if (left <= 0) return;
                int64_t count = left < BLOCK ? left : BLOCK, whole = count / CHAINS * CHAINS;
                const float *weight = scores(h, i) + s - base, *value = call.v_cache.at(row, s, head + h);
                add_values<CHAINS>(weight, value, stride, whole, d, sums_of(h, i));
                for (int64_t j = whole; j < count; ++j)
                    add_values<1>(weight + j, value + j * stride, stride, 1, d, sums_of(h, i) + (j - whole) * width);
            });
        for_queries([&](int64_t h, int64_t i) {
            const float* sum = sums_of(h, i);
            Vec whole = splat(1.0f / total[h * queries + i]);
            float* out = const_cast<float*>(at(call.out, h, i));
            for (int c = 0; c < d; c += LANES) {
                Vec even = load(sum + c) + load(sum + 2 * width + c);
                Vec odd = load(sum + width + c) + load(sum + 3 * width + c);
                store(out + c, (even + odd) * whole, d - c);
            }
        });
    }
};

}  // namespace

void cached_attention(const AttentionCall& call, int64_t first, int64_t last, float* floats) {
    CachedScratch scratch(call, floats);
    int64_t group = call.H / call.H_kv, queries = call.T * group;
    for (int64_t unit = first, heads; unit < last; unit += heads) {
        int64_t row = unit / call.H_kv, head = unit % call.H_kv, length = call.lengths[row];
        heads = least(scratch.heads, least(call.H_kv - head, last - unit));
        for (int64_t t = 0; t < call.T; ++t)
            for (int64_t h = head; h < head + heads; ++h) {
                rotated(call, call.k.at(row, t, h), length + t, 1, call.k_cache.at(row, length + t, h));
                copy(call.v.at(row, t, h), call.d, call.v_cache.at(row, length + t, h));
            }
        for (int64_t begin = 0; begin < queries; begin += QUERIES) {
            Pass pass{call, scratch, row, head, heads, group, begin, least(QUERIES, queries - begin)};
            pass.base = call.first_key(pass.position(0));
            pass.end = pass.position(pass.queries - 1) + 1;
            pass.rotate_queries();
            pass.multiply_keys();
            pass.sum_values();
        }
    }
}

}  // namespace starflow::STARFLOW_ISA
