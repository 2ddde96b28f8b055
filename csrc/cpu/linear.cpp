// The products of a linear layer and of its gradient, for many rows.
#include "elementary.h"
#include "lanes.h"
#include "product.h"

namespace starflow::STARFLOW_ISA {

namespace {

// Rows and column tiles of a weight gradient whose sums fit into the registers.
constexpr int GRADIENT_TILES = ACCUMULATORS >= 24 ? 4 : ACCUMULATORS >= 6 ? 2 : 1;
constexpr int GRADIENT_ROWS = ACCUMULATORS / GRADIENT_TILES;
// Samples per partial sum; partial sums are added in order.
constexpr int64_t SAMPLES = 128;

// Sets out (ROWS, 16 TILES) to the sum over samples of grad (ROWS,) times x (16 TILES,), or adds the sum to it. The
// last tile has `count` columns.
template <int ROWS, int TILES>
void add_outer(const float* grad, int64_t N, const float* x, int64_t ldx, int64_t samples, int count, bool first,
               float* out, int64_t K) {
    Vec sum[ROWS][TILES];
    UNROLL
    for (int n = 0; n < ROWS; ++n) {
        UNROLL
        for (int t = 0; t < TILES; ++t) sum[n][t] = splat(0.0f);
    }
    for (int64_t m = 0; m < samples; ++m) {
        Vec columns[TILES];
        UNROLL
        for (int t = 0; t < TILES; ++t)
            columns[t] = TILES == 1 ? load(x + m * ldx, count) : load(x + m * ldx + t * LANES);
        UNROLL
        for (int n = 0; n < ROWS; ++n) {
            Vec scale = splat(grad[m * N + n]);
            UNROLL
            for (int t = 0; t < TILES; ++t) sum[n][t] = fma(scale, columns[t], sum[n][t]);
        }
    }
    UNROLL
    for (int n = 0; n < ROWS; ++n) {
        UNROLL
        for (int t = 0; t < TILES; ++t) {
            float* to = out + n * K + t * LANES;
            int lanes = TILES == 1 ? count : LANES;
            store(to, first ? sum[n][t] : load(to, lanes) + sum[n][t], lanes);
        }
    }
}

template <int TILES, int ROWS = GRADIENT_ROWS>
void add_rows(int rows, const float* grad, int64_t N, const float* x, int64_t ldx, int64_t samples, int count,
              bool first, float* out, int64_t K) {
    if constexpr (ROWS > 1)
        if (rows < ROWS) return add_rows<TILES, ROWS - 1>(rows, grad, N, x, ldx, samples, count, first, out, K);
    add_outer<ROWS, TILES>(grad, N, x, ldx, samples, count, first, out, K);
}

}  // namespace

void pack(const LinearCall& call, int64_t first_tile, int64_t last_tile) {
    for (int64_t n = first_tile * LANES; n < last_tile * LANES; n += LANES)
        for (int64_t k = 0; k < call.K; k += LANES) {
            int64_t rows = call.K - k < LANES ? call.K - k : LANES, columns = call.N - n < LANES ? call.N - n : LANES;
            float* to = call.packed + n * call.K + k * LANES;
            if (call.across)
                for (int64_t i = 0; i < rows; ++i)
                    store(to + i * LANES, load(call.weight + (k + i) * call.N + n, int(columns)));
            else if (rows == LANES && columns == LANES)
                transpose(call.weight + n * call.K + k, call.K, to, LANES);
            else
                for (int64_t i = 0; i < rows; ++i)
                    for (int64_t j = 0; j < LANES; ++j)
                        to[i * LANES + j] = j < columns ? call.weight[(n + j) * call.K + k + i] : 0;
        }
}

void linear(const LinearCall& call, int64_t first_row, int64_t last_row, float* scratch) {
    int64_t N = call.N, M = last_row - first_row, tiles = (N + 15) / 16;
    // Prefetches the outputs that are written next, where these are adjacent.
    Stream next(call.y + last_row * N, M * N, M, tiles, call.K);
    product(
        call.x + first_row * call.K, call.K, M, call.packed, call.K, 0, tiles, scratch,
        [&](int64_t m, int64_t tile, Vec v) __attribute__((always_inline)) {
            int64_t n = tile * LANES;
            int count = int(N - n);
            Vec bias = call.bias ? load(call.bias + n, count) : splat(0.0f);
            v = v + bias;
            store(call.y + (first_row + m) * call.stride + n, call.sigmoid ? sigmoid(v) : v, count);
        },
        call.stride == N ? &next : nullptr);
}

// Computes the rows first .. last - 1 of grad_weight (N, K), and those values of grad_bias.
void linear_weight_gradient(const LinearCall& call, int64_t first, int64_t last) {
    int64_t N = call.N, K = call.K;
    constexpr int64_t WIDE = GRADIENT_TILES * LANES;
    // Columns of x side by side: rows that are a power of two apart would take each other's places in the cache.
    alignas(64) float panel[SAMPLES * WIDE];
    for (int64_t m = 0; m < call.M; m += SAMPLES) {
        int64_t samples = call.M - m < SAMPLES ? call.M - m : SAMPLES;
        bool set = m == 0 && !call.add;
        for (int64_t n = first; call.grad_bias && n < last; n += LANES) {
            int count = int(last - n < LANES ? last - n : LANES);
            Vec part[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
            const float* grad = call.y + m * N + n;
            int64_t i = 0;
            for (; i + 4 <= samples; i += 4) {
                UNROLL
                for (int j = 0; j < 4; ++j) part[j] = part[j] + load(grad + (i + j) * N, count);
            }
            for (; i < samples; ++i) part[0] = part[0] + load(grad + i * N, count);
            Vec total = (part[0] + part[1]) + (part[2] + part[3]);
            store(call.grad_bias + n, set ? total : load(call.grad_bias + n, count) + total, count);
        }
        for (int64_t k = 0; k < K;) {
            bool wide = K - k >= WIDE;
            const float* x = call.x + m * K + k;
            for (int64_t i = 0; wide && i < samples; ++i) {
                UNROLL
                for (int64_t t = 0; t < WIDE; t += LANES) {
                    store(panel + i * WIDE + t, load(x + i * K + t));
                    __builtin_prefetch(x + i * K + t + WIDE, 0, 2);
                }
            }
            for (int64_t n = first; n < last; n += GRADIENT_ROWS) {
                int rows = int(last - n < GRADIENT_ROWS ? last - n : GRADIENT_ROWS);
                const float* grad = call.y + m * N + n;
                float* out = call.grad_weight + n * K + k;
                if (wide)
                    add_rows<GRADIENT_TILES>(rows, grad, N, panel, WIDE, samples, LANES, set, out, K);
                else
                    add_rows<1>(rows, grad, N, x, K, samples, int(K - k < LANES ? K - k : LANES), set, out, K);
            }
            k += wide ? WIDE : LANES;
        }
    }
}

}  // namespace starflow::STARFLOW_ISA
