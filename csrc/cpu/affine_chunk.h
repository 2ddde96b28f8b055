// The affine transform in the density direction, on a chunk of the tokens of a sequence.
#pragma once

#include "affine_rows.h"

namespace starflow::STARFLOW_ISA {

constexpr int64_t MOST = MAX_TOKEN_DIM;  // values of a chunk

struct Scratch {
    alignas(64) float a[MOST + ROOM], b[MOST + ROOM], sigma[MOST + ROOM], x[MOST + ROOM], z[MOST + ROOM],
        grad_l[MOST + ROOM];
};

struct Chunk {
    const AffineCall& call;
    int64_t row, begin, tokens;  // tokens begin .. begin + tokens - 1 of sequence `row` have parameters
    int64_t identity = -1;       // token that passes unchanged, -1 for none

    Chunk(const AffineCall& call, int64_t index) : call(call) {
        row = index / call.chunks();
        begin = index % call.chunks() * call.chunk;
        tokens = call.T - begin < call.chunk ? call.T - begin : call.chunk;
        if (!call.shift) return;
        if (call.flip && begin + tokens == call.T) identity = begin + --tokens;
        if (!call.flip && begin == 0) identity = begin++, --tokens;
    }
    int64_t size() const { return tokens * call.D; }
    int64_t at(int64_t token) const { return (row * call.T + token) * call.D; }
    // Returns the index of a token's parameters. The indices of a chunk are contiguous, ascending or descending.
    int64_t source(int64_t token) const { return (call.flip ? call.T - 1 - token : token) - call.shift; }
    int64_t first_source() const { return call.flip ? source(begin + tokens - 1) : source(begin); }

    // Copies raw parameters to rows in the order of x. Source s is at `at` + (s - first_source()) stride.
    void gather(const void* from, Format format, int64_t at, int64_t stride, Scratch& room) const {
        int64_t D = call.D, mean = call.P() - D;
        for (int64_t i = 0; i < tokens; ++i) {
            int64_t place = at + (source(begin + i) - first_source()) * stride;
            if (mean) read(from, format, place, D, room.a + i * D);
            read(from, format, place + mean, D, room.b + i * D);
        }
        store(room.a + size(), splat(0.0f));
        store(room.b + size(), splat(0.0f));
    }

    // Writes gradients back in the order of the raw parameters.
    void scatter(const Scratch& room, void* to, Format format, int64_t at, int64_t stride) const {
        int64_t D = call.D, mean = call.P() - D;
        for (int64_t i = 0; i < tokens; ++i) {
            int64_t place = at + (source(begin + i) - first_source()) * stride;
            if (mean) write(to, format, place, D, room.a + i * D);
            write(to, format, place + mean, D, room.b + i * D);
        }
    }

    // Computes z and the log-determinant from the parameters in `room`.
    void density(int64_t index, Scratch& room, auto ahead) const {
        bool narrow = call.x_format != Format::float32, each_value = call.logdet == Logdet::none;
        int64_t at = this->at(begin), n = size();
        const float* x = floats(call.x, call.x_format, at, n, room.x);
        float* z = narrow ? room.z : static_cast<float*>(call.z) + at;
        float* logdets = each_value ? call.logdets + at : nullptr;
        double total = density_rows(room.a, room.b, room.sigma, x, n, call.affine, z, logdets, ahead);
        if (narrow) write(call.z, call.x_format, at, n, z);
        if (!each_value) call.partial[index] = total;
        if (identity < 0) return;
        at = this->at(identity);
        read(call.x, call.x_format, at, call.D, room.x);
        write(call.z, call.x_format, at, call.D, room.x);
        if (each_value) memset(call.logdets + at, 0, call.D * sizeof(float));
    }

    // Computes grad_x, and replaces the parameters in `room` by their gradients.
    void gradient(Scratch& room, auto ahead) const {
        bool narrow = call.x_format != Format::float32;
        int64_t at = this->at(begin), n = size();
        auto gradient_of_z = [&](int64_t at, int64_t n) {
            if (call.grad_z) return floats(call.grad_z, call.x_format, at, n, room.x);
            memset(room.x, 0, n * sizeof(float));
            return static_cast<const float*>(room.x);
        };
        const float *grad_z = gradient_of_z(at, n), *z = floats(call.saved_z, call.x_format, at, n, room.z);
        if (call.logdet == Logdet::none && call.grad_logdet) {
            read(call.grad_logdet, Format::float32, at, n, room.grad_l);
        } else {
            float whole = call.grad_logdet ? call.grad_logdet[row] : 0;
            if (call.logdet == Logdet::mean) whole /= float(call.T * call.D);
            for (int64_t i = 0; i < n; i += LANES) store(room.grad_l + i, splat(whole));
        }
        float* grad_x = narrow ? room.x : static_cast<float*>(call.grad_x) + at;
        density_gradient_rows(room.a, room.b, room.sigma, grad_z, z, room.grad_l, n, call.affine, grad_x, ahead);
        if (narrow) write(call.grad_x, call.x_format, at, n, grad_x);
        if (identity < 0) return;
        at = this->at(identity);
        read(gradient_of_z(at, call.D), Format::float32, 0, call.D, room.z);
        write(call.grad_x, call.x_format, at, call.D, room.z);
    }
};

}  // namespace starflow::STARFLOW_ISA
