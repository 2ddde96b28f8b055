// Op of the inverse of a masked autoregressive transform.
#include <algorithm>

#include "bindings.h"

namespace starflow {

namespace {

// SAMPLES: samples that a thread takes at a time. SERIAL: below about this many multiply-adds, threads cost more than they
// save. MOST: largest number in a plan.
constexpr int64_t SAMPLES = MASKED_SAMPLES, SERIAL = 1 << 20, MOST = int64_t(1) << 31;

void check(bool condition) { STD_TORCH_CHECK(condition, "native kernels: the plan does not fit"); }

// Reads the numbers of a plan in their order, see masked_inverse/plan.py.
class Reader {
    const int64_t *next, *end;

public:
    explicit Reader(const Tensor& tensor)
        : next(static_cast<const int64_t*>(values(tensor, ScalarType::Long, ANY))), end(next + tensor.numel()) {}

    int64_t number(int64_t least, int64_t most) {
        check(next < end && *next >= least && *next <= most);
        return *next++;
    }
    const int64_t* numbers(int64_t count, int64_t least, int64_t most) {
        check(count <= end - next);
        for (int64_t i = 0; i < count; ++i) check(next[i] >= least && next[i] <= most);
        return (next += count) - count;
    }
    const int64_t* ascending(int64_t count, int64_t most) {
        const int64_t* found = numbers(count, 0, most);
        check(std::is_sorted(found, found + count));
        return found;
    }
    void finish() const { check(next == end); }
};

void masked_inverse(Tensor y, Tensor plan, Tensor weights, Tensor offsets, Tensor samples, int64_t kind,
                    std::vector<double> constants, Tensor x, Tensor logdet) {
    MaskedCall call{};
    check_dims(y, 2), check_dims(samples, 2);
    ScalarType type = y.scalar_type();
    call.is_double = type == ScalarType::Double;
    STD_TORCH_CHECK(call.is_double || type == ScalarType::Float, "native kernels: a tensor is of the wrong dtype");
    int64_t size = call.is_double ? sizeof(double) : sizeof(float);
    call.B = y.size(0), call.D = y.size(1), call.samples_width = samples.size(1);
    check_positive({call.D});
    Reader reader(plan);
    reader.number(call.D, call.D);
    call.steps = reader.number(1, call.D), call.P = reader.number(1, MOST);
    call.count_layers = reader.number(1, MOST);
    call.column = reader.numbers(call.D, 0, call.D - 1);
    call.solved = reader.ascending(call.steps + 1, call.D);
    check(call.solved[0] == 0 && call.solved[call.steps] == call.D);
    std::vector<MaskedLayer> layers;
    auto weight = static_cast<char*>(values(weights, type, ANY)),
         offset = static_cast<char*>(values(offsets, type, ANY));
    int64_t columns = call.D, weights_read = 0, offsets_read = 0, samples_read = 0, place = call.D;
    int64_t input = 0;
    for (int64_t i = 0; i < call.count_layers; ++i) {
        MaskedLayer layer{};
        layer.rows = reader.number(1, MOST), layer.columns = columns;
        layer.activation = Activation(reader.number(0, int64_t(Activation::softplus)));
        // The activated outputs of the layer before have a place of their own.
        if (i && layer.activation != Activation::identity) input = place, place += columns;
        layer.skip = reader.number(-1, i - 1);
        bool is_last = i + 1 == call.count_layers;
        for (int64_t* first : {&layer.sample_offset, &layer.sample_scale}) {
            *first = reader.number(-1, MOST);
            if (*first < 0) continue;
            check(*first + layer.rows <= call.samples_width);
            samples_read += layer.rows;
        }
        layer.unit = reader.numbers(layer.rows, 0, layer.rows - 1);
        layer.skip_row = reader.numbers(layer.rows, 0, layer.skip < 0 ? 0 : layers[layer.skip].rows - 1);
        layer.ready = reader.ascending(call.steps, layer.rows);
        weights_read += layer.rows * columns, offsets_read += layer.rows;
        check(weights_read <= weights.numel() && offsets_read <= offsets.numel());
        layer.weight = weight + (weights_read - layer.rows * columns) * size;
        layer.offset = offset + (offsets_read - layer.rows) * size;
        layer.input = input;
        if (!is_last) input = layer.output = place, place += layer.rows;
        if (is_last) check(layer.rows == call.D * call.P);
        columns = layer.rows;
        layers.push_back(layer);
    }
    reader.finish();
    check(weights_read == weights.numel() && offsets_read == offsets.numel() && samples_read == call.samples_width);
    call.layers = layers.data(), call.params = place, call.work_rows = place + call.P + 2;
    call.samples = values(samples, type, call.B * call.samples_width);
    call.y = values(y, type, ANY), call.x = values(x, type, call.B * call.D);
    call.logdet = values(logdet, type, call.B);
    check(kind >= 0 && kind <= int64_t(Univariate::spline_softmax) && constants.size() == 6);
    call.kind = Univariate(kind), call.inverse_log_slope = constants[1];
    if (call.kind >= Univariate::spline_soft_clip) {
        check(call.P % 3 == 2);
        call.bins = (call.P + 1) / 3, call.bound = constants[0];
        call.min_width = constants[2], call.min_height = constants[3];
        call.min_derivative = constants[4], call.inverse_divisor = constants[5];
    } else {
        check(call.P == 2);
        call.scale_first = constants[0] != 0, call.epsilon = constants[2], call.bias = constants[3];
        call.low = constants[4], call.high = constants[5];
    }
    int64_t chunks = (call.B + SAMPLES - 1) / SAMPLES, at_least = SERIAL / (SAMPLES * weights_read) + 1;
    parallel_for(chunks, at_least, [&](int64_t first, int64_t last) {
        Floats work(call.work_rows * SAMPLES * size / int64_t(sizeof(float)), Floats::anything);
        kernels().masked_inverse(call, first * SAMPLES, std::min(call.B, last * SAMPLES), work.data());
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(starflow_native, m) {
    m.def(
        "masked_inverse(Tensor y, Tensor plan, Tensor weights, Tensor offsets, Tensor samples, int kind, "
        "float[] constants, Tensor(a!) x, Tensor(b!) logdet) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(starflow_native, CPU, m) { m.impl("masked_inverse", TORCH_BOX(&masked_inverse)); }

}  // namespace starflow
