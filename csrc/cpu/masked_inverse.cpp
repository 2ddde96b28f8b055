// Inverse of an autoregressive transform whose parameters a masked network computes. Samples are the vector lanes, and
// each hidden unit is computed once, in the step that solves its last input; see masked_inverse/plan.py.
#include "doubles.h"
#include "kernels.h"

namespace starflow::STARFLOW_ISA {

namespace {

template <class V>
struct Lanes;
template <>
struct Lanes<Vec> {
    using Value = float;
    static constexpr int count = LANES;
};
template <>
struct Lanes<Doubles> {
    using Value = double;
    static constexpr int count = DOUBLE_LANES;
};

template <class V>
INLINE V constant(double value) {
    return splat(typename Lanes<V>::Value(value));
}

template <class V>
INLINE V sigmoid(V x) {
    return constant<V>(1) / (constant<V>(1) + exp(-x));
}

template <class V>
INLINE V softplus(V x) {
    return max(x, constant<V>(0)) + log1p(exp(-abs(x)));
}

template <class V>
INLINE V activated(Activation which, V x) {
    V zero = constant<V>(0);
    switch (which) {
        case Activation::identity: return x;
        case Activation::relu: return select(x < zero, zero, x);
        case Activation::leaky_relu: return select(x < zero, constant<V>(0.01) * x, x);
        case Activation::elu: return select(x > zero, x, exp(x) - constant<V>(1));
        case Activation::tanh: return tanh(x);
        case Activation::sigmoid: return sigmoid(x);
        case Activation::silu: return silu(x);
        case Activation::gelu: return gelu(x);
        case Activation::gelu_tanh: return gelu_tanh(x);
        case Activation::softplus: return softplus(x);
    }
    return x;
}

// Returns x, and adds log|dx/dy| to logdet.
template <class V>
INLINE V solve_affine(const MaskedCall& call, V y, V first, V second, V& logdet) {
    V one = constant<V>(1), m = call.scale_first ? second : first, a = call.scale_first ? first : second, log_s, s;
    switch (call.kind) {
        case Univariate::soft_clip: log_s = a / (one + abs(a * constant<V>(call.inverse_log_slope))); break;
        case Univariate::clamp: log_s = min(max(a, constant<V>(call.low)), constant<V>(call.high)); break;
        case Univariate::softplus:
            s = softplus(a) + constant<V>(call.epsilon);
            logdet = logdet - log(s);
            return (y - m) / s;
        case Univariate::sigmoid:
            s = sigmoid(a + constant<V>(call.bias)) + constant<V>(call.epsilon);
            logdet = logdet - log(s);
            return (y - m) / s;
        default: {
            V e = exp(-a - constant<V>(call.bias));
            logdet = logdet + softplus(-a - constant<V>(call.bias));
            return fma(e, y - m, y);
        }
    }
    logdet = logdet - log_s;
    return (y - m) * exp(-log_s);
}

// Replaces the raw sizes of the bins of one axis, each `stride` values from the next, by their exponentials, and returns
// what scales their sum to the length of the axis.
template <class V>
INLINE V bin_sizes(const MaskedCall& call, typename Lanes<V>::Value* raw, int64_t stride, double smallest) {
    V largest = constant<V>(-1e30), sum = constant<V>(0);
    for (int64_t k = 0; k < call.bins; ++k) {
        V r = load(raw + k * stride);
        if (call.kind == Univariate::spline_soft_clip)
            r = r / (constant<V>(1) + abs(r * constant<V>(2 * call.inverse_log_slope)));
        else
            r = r * constant<V>(call.inverse_divisor);
        largest = max(r, largest);
        store(raw + k * stride, r);
    }
    for (int64_t k = 0; k < call.bins; ++k) {
        V r = exp(load(raw + k * stride) - largest);
        sum = sum + r;
        store(raw + k * stride, r);
    }
    return constant<V>(2 * call.bound * (1 - smallest * call.bins)) / sum;
}

template <class V>
INLINE V solve_spline(const MaskedCall& call, V y, typename Lanes<V>::Value* params, int64_t stride, V& logdet) {
    bool clip = call.kind == Univariate::spline_soft_clip;
    double least_width = clip ? 0 : call.min_width, least_height = clip ? 0 : call.min_height;
    auto *widths = params, *heights = widths + call.bins * stride, *slopes = heights + call.bins * stride;
    V width_scale = bin_sizes<V>(call, widths, stride, least_width);
    V height_scale = bin_sizes<V>(call, heights, stride, least_height);
    V bound = constant<V>(call.bound), left = -bound, low = -bound, x0 = left, y0 = low, width = bound, height = bound;
    // The derivative at both ends is 1, and there is no raw value for it.
    V one = constant<V>(1), zero = constant<V>(0), raw0 = zero, raw1 = zero, has0 = zero, has1 = zero;
    for (int64_t k = 0; k < call.bins; ++k) {
        V w = fma(load(widths + k * stride), width_scale, constant<V>(2 * call.bound * least_width));
        V h = fma(load(heights + k * stride), height_scale, constant<V>(2 * call.bound * least_height));
        // The first bin also stands in for values outside of the spline, whose results are not used.
        auto here = k ? y > low : bound > zero;
        x0 = select(here, left, x0), y0 = select(here, low, y0);
        width = select(here, w, width), height = select(here, h, height);
        raw0 = select(here, k ? load(slopes + (k - 1) * stride) : zero, raw0);
        raw1 = select(here, k + 1 < call.bins ? load(slopes + k * stride) : zero, raw1);
        has0 = select(here, k ? one : zero, has0), has1 = select(here, k + 1 < call.bins ? one : zero, has1);
        left = left + w, low = low + h;
    }
    auto slope = [&](V raw, V has) __attribute__((always_inline)) {
        V inner = clip ? exp(raw / (one + abs(raw * constant<V>(call.inverse_log_slope))))
                       : softplus(raw) + constant<V>(call.min_derivative);
        return select(has > zero, inner, one);
    };
    V d0 = slope(raw0, has0), d1 = slope(raw1, has1), s = height / width, bend = d0 + d1 - (s + s);
    auto inside = (y > -bound) & (y < bound);
    V rise = select(inside, y - y0, zero), bent = rise * bend;
    V a = fma(height, s - d0, bent), b = height * d0 - bent, c = s * rise, four = constant<V>(4);
    V z = (c + c) / (b + root(max(b * b + four * a * c, zero))), rest = one - z, both = z * rest;
    V below = fma(bend, both, s), ratio = s / below;
    V derivative = ratio * ratio * (d1 * z * z + (s + s) * both + d0 * rest * rest);
    logdet = logdet - select(inside, log(derivative), zero);
    return select(inside, fma(z, width, x0), y);
}

// Units that are computed together and vectors of samples per chunk, for the registers of the machine.
#if defined(__AVX512F__)
constexpr int UNITS = 4, WIDE = 2;
#else
constexpr int UNITS = 2, WIDE = 1;
#endif

// Sets N outputs (N, W vectors) to the products of N rows of the weight with `depth` inputs. The sum of each output has
// one order for every N and W.
template <int N, int W, class V, class Value>
INLINE void multiply(const Value* weight, int64_t ldw, const Value* inputs, int64_t depth, Value* outputs) {
    constexpr int L = Lanes<V>::count, S = L * W;
    V sums[2][N][W];
    UNROLL
    for (int n = 0; n < N; ++n) {
        UNROLL
        for (int w = 0; w < W; ++w) sums[0][n][w] = sums[1][n][w] = constant<V>(0);
    }
    int64_t k = 0;
    auto add = [&](int part, int64_t k) __attribute__((always_inline)) {
        V input[W];
        UNROLL
        for (int w = 0; w < W; ++w) input[w] = load(inputs + k * S + w * L);
        UNROLL
        for (int n = 0; n < N; ++n) {
            V factor = splat(weight[n * ldw + k]);
            UNROLL
            for (int w = 0; w < W; ++w) sums[part][n][w] = fma(factor, input[w], sums[part][n][w]);
        }
    };
    for (; k + 2 <= depth; k += 2) add(0, k), add(1, k + 1);
    if (k < depth) add(0, k);
    UNROLL
    for (int n = 0; n < N; ++n) {
        UNROLL
        for (int w = 0; w < W; ++w) store(outputs + n * S + w * L, sums[0][n][w] + sums[1][n][w]);
    }
}

// One chunk of up to S samples. Rows of buffers have S values.
template <class V, int W>
struct Chunk {
    using Value = typename Lanes<V>::Value;
    static constexpr int L = Lanes<V>::count, S = L * W;

    const MaskedCall& call;
    int64_t first, count;
    Value* work;

    Value* outputs(int64_t layer) const { return work + call.layers[layer].output * S; }
    // Returns what a layer multiplies: the outputs of the one before, or the solved features, after its activation.
    Value* inputs(int64_t layer) const { return work + call.layers[layer].input * S; }

    // Computes the outputs begin .. end - 1 of a layer into `to`.
    void compute(int64_t index, int64_t begin, int64_t end, int64_t depth, Value* to) const {
        const MaskedLayer& layer = call.layers[index];
        auto weight = static_cast<const Value*>(layer.weight) + begin * layer.columns;
        const Value* from = inputs(index);
        int64_t row = 0, rows = end - begin;
        for (; row + UNITS <= rows; row += UNITS)
            multiply<UNITS, W, V>(weight + row * layer.columns, layer.columns, from, depth, to + row * S);
        for (; row < rows; ++row)
            multiply<1, W, V>(weight + row * layer.columns, layer.columns, from, depth, to + row * S);
        auto offset = static_cast<const Value*>(layer.offset) + begin;
        auto samples = static_cast<const Value*>(call.samples) + first * call.samples_width;
        for (row = 0; row < rows; ++row) {
            Value* out = to + row * S;
            for (int s = 0; s < S; ++s) out[s] += offset[row];
            int64_t unit = layer.unit[begin + row];
            if (layer.sample_offset >= 0)
                for (int64_t s = 0; s < count; ++s)
                    out[s] += samples[s * call.samples_width + layer.sample_offset + unit];
            if (layer.sample_scale >= 0)
                for (int64_t s = 0; s < count; ++s)
                    out[s] *= samples[s * call.samples_width + layer.sample_scale + unit];
            if (layer.skip >= 0) {
                const Value* added = outputs(layer.skip) + layer.skip_row[begin + row] * S;
                for (int s = 0; s < S; ++s) out[s] += added[s];
            }
        }
    }

    // Applies the activation of a layer to its inputs begin .. end - 1, which are in `from`.
    void activate(int64_t layer, const Value* from, int64_t begin, int64_t end) const {
        Value* to = inputs(layer) + begin * S;
        Activation which = call.layers[layer].activation;
        if (to == from) return;
        for (int64_t i = 0; i < (end - begin) * S; i += L) store(to + i, activated(which, load(from + i)));
    }

    void run() const {
        auto y = static_cast<const Value*>(call.y) + first * call.D;
        auto x = static_cast<Value*>(call.x) + first * call.D;
        Value *params = work + call.params * S, *solved = params + call.P * S;
        Value* logdet = solved + S;
        for (int s = 0; s < S; ++s) logdet[s] = solved[s] = 0;
        int64_t last = call.count_layers - 1;
        for (int64_t step = 0; step < call.steps; ++step) {
            int64_t depth = call.solved[step];
            for (int64_t i = 0; i < last; ++i) {
                const MaskedLayer& layer = call.layers[i];
                int64_t begin = step ? layer.ready[step - 1] : 0, end = layer.ready[step];
                Value* to = outputs(i) + begin * S;
                compute(i, begin, end, depth, to);
                activate(i + 1, to, begin, end);
                depth = end;
            }
            for (int64_t feature = call.solved[step]; feature < call.solved[step + 1]; ++feature) {
                compute(last, feature * call.P, (feature + 1) * call.P, depth, params);
                int64_t column = call.column[feature];
                for (int64_t s = 0; s < S; ++s) solved[s] = s < count ? y[s * call.D + column] : 0;
                for (int i = 0; i < S; i += L) {
                    V sum = load(logdet + i), at = load(solved + i);
                    V found = call.bins ? solve_spline<V>(call, at, params + i, S, sum)
                                        : solve_affine<V>(call, at, load(params + i), load(params + S + i), sum);
                    store(solved + i, found), store(logdet + i, sum);
                }
                for (int64_t s = 0; s < count; ++s) x[s * call.D + column] = solved[s];
                activate(0, solved, feature, feature + 1);
            }
        }
        for (int64_t s = 0; s < count; ++s) static_cast<Value*>(call.logdet)[first + s] = logdet[s];
    }
};

template <class V>
void run(const MaskedCall& call, int64_t first, int64_t last, void* work) {
    constexpr int L = Lanes<V>::count;
    auto buffer = static_cast<typename Lanes<V>::Value*>(work);
    for (int64_t row = first; row < last;) {
        int64_t left = last - row;
        if (WIDE > 1 && left > L) {
            int64_t count = left < WIDE * L ? left : WIDE * L;
            Chunk<V, WIDE>{call, row, count, buffer}.run();
            row += count;
        } else {
            int64_t count = left < L ? left : L;
            Chunk<V, 1>{call, row, count, buffer}.run();
            row += count;
        }
    }
}

}  // namespace

void masked_inverse(const MaskedCall& call, int64_t first, int64_t last, void* work) {
    call.is_double ? run<Doubles>(call, first, last, work) : run<Vec>(call, first, last, work);
}

}  // namespace starflow::STARFLOW_ISA
