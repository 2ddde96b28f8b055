// The affine transform, density direction, and its gradient. A chunk of tokens has its parameters gathered, shift and
// order undone, into two rows a and b that run along with x; memory is read and written once.
#include "affine_rows.h"

namespace starflow::STARFLOW_ISA {

namespace {

constexpr int64_t MOST = 8192;  // floats of a chunk: D <= MOST, see affine_flow/cpu.py

struct Scratch {
    alignas(64) float a[MOST + ROOM], b[MOST + ROOM], sigma[MOST + ROOM], x[MOST + ROOM], z[MOST + ROOM];
};

// Bring in what the next chunk reads while this one is computed: no machine foresees tokens in reverse order.
void fetch(const void* from, Format format, int64_t at, int64_t n) {
    int64_t size = format == Format::float32 ? 4 : 2;
    auto bytes = static_cast<const char*>(from) + at * size;
    for (int64_t i = 0; i < n * size; i += 64) __builtin_prefetch(bytes + i);
}

struct Chunk {
    const AffineCall& call;
    int64_t row, begin, tokens;  // tokens begin .. begin + tokens - 1 of sequence `row` have parameters
    int64_t identity = -1;       // and this one passes unchanged, -1: none

    Chunk(const AffineCall& call, int64_t index) : call(call) {
        row = index / call.chunks();
        begin = index % call.chunks() * call.chunk();
        tokens = call.T - begin < call.chunk() ? call.T - begin : call.chunk();
        if (!call.shift) return;
        if (call.flip && begin + tokens == call.T) identity = begin + --tokens;
        if (!call.flip && begin == 0) identity = begin++, --tokens;
    }
    int64_t size() const { return tokens * call.D; }
    int64_t at(int64_t token) const { return (row * call.T + token) * call.D; }
    // Place of the parameters that transform a token.
    int64_t params_at(int64_t token) const {
        return (row * call.T + (call.flip ? call.T - 1 - token : token) - call.shift) * call.P();
    }

    void gather(float* a, float* b) const {
        int64_t D = call.D, mean = call.P() - D;
        for (int64_t i = 0; i < tokens; ++i) {
            int64_t from = params_at(begin + i);
            fetch(call.params, call.params_format, from + (call.flip ? -1 : 1) * tokens * call.P(), call.P());
            if (mean) read(call.params, call.params_format, from, D, a + i * D);
            read(call.params, call.params_format, from + mean, D, b + i * D);
        }
        store(a + size(), splat(0.0f));
        store(b + size(), splat(0.0f));
    }

    void scatter(const float* a, const float* b) const {
        int64_t D = call.D, mean = call.P() - D;
        for (int64_t i = 0; i < tokens; ++i) {
            int64_t to = params_at(begin + i);
            if (mean) write(call.grad_params, call.params_format, to, D, a + i * D);
            write(call.grad_params, call.params_format, to + mean, D, b + i * D);
        }
    }
};

}  // namespace

void affine_flow(const AffineCall& call, int64_t first_chunk, int64_t last_chunk) {
    Scratch room;
    bool narrow = call.x_format != Format::float32, each_value = call.logdet == Logdet::none;
    for (int64_t index = first_chunk; index < last_chunk; ++index) {
        Chunk chunk(call, index);
        int64_t at = chunk.at(chunk.begin), n = chunk.size();
        chunk.gather(room.a, room.b);
        fetch(call.x, call.x_format, at + n, n);
        const float* x = floats(call.x, call.x_format, at, n, room.x);
        float* z = narrow ? room.z : static_cast<float*>(call.z) + at;
        float* logdets = each_value ? call.logdets + at : nullptr;
        double total = density_rows(room.a, room.b, room.sigma, x, n, call.affine, z, logdets);
        if (narrow) write(call.z, call.x_format, at, n, z);
        if (!each_value) call.partial[index] = total;
        if (chunk.identity < 0) continue;
        at = chunk.at(chunk.identity);
        read(call.x, call.x_format, at, call.D, room.x);
        write(call.z, call.x_format, at, call.D, room.x);
        if (each_value) memset(call.logdets + at, 0, call.D * sizeof(float));
    }
}

void affine_flow_backward(const AffineCall& call, int64_t first_chunk, int64_t last_chunk) {
    Scratch room;
    alignas(64) float grad_l[MOST + ROOM];
    bool narrow = call.x_format != Format::float32, each_value = call.logdet == Logdet::none;
    for (int64_t index = first_chunk; index < last_chunk; ++index) {
        Chunk chunk(call, index);
        int64_t at = chunk.at(chunk.begin), n = chunk.size();
        chunk.gather(room.a, room.b);
        if (call.grad_z) fetch(call.grad_z, call.x_format, at + n, n);
        fetch(call.saved_z, call.x_format, at + n, n);
        auto gradient = [&](int64_t at, int64_t n) {
            if (call.grad_z) return floats(call.grad_z, call.x_format, at, n, room.x);
            memset(room.x, 0, n * sizeof(float));
            return static_cast<const float*>(room.x);
        };
        const float *grad_z = gradient(at, n), *z = floats(call.saved_z, call.x_format, at, n, room.z);
        if (each_value && call.grad_logdet) {
            read(call.grad_logdet, Format::float32, at, n, grad_l);
        } else {
            float whole = call.grad_logdet ? call.grad_logdet[chunk.row] : 0;
            if (call.logdet == Logdet::mean) whole /= float(call.T * call.D);
            for (int64_t i = 0; i < n; i += LANES) store(grad_l + i, splat(whole));
        }
        float* grad_x = narrow ? room.x : static_cast<float*>(call.grad_x) + at;
        density_gradient_rows(room.a, room.b, room.sigma, grad_z, z, grad_l, n, call.affine, grad_x);
        if (narrow) write(call.grad_x, call.x_format, at, n, grad_x);
        chunk.scatter(room.a, room.b);
        if (chunk.identity < 0) continue;
        // The last parameters of the sequence belong to no token.
        at = chunk.at(chunk.identity);
        memset(room.a, 0, call.P() * sizeof(float));
        read(gradient(at, call.D), Format::float32, 0, call.D, room.z);
        write(call.grad_x, call.x_format, at, call.D, room.z);
        write(call.grad_params, call.params_format, (chunk.row * call.T + call.T - 1) * call.P(), call.P(), room.a);
    }
}

}  // namespace starflow::STARFLOW_ISA
