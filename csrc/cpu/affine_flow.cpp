// The affine transform, density direction, and its gradient. A chunk of tokens has its parameters gathered, shift and
// order undone, into two rows a and b that run along with x; memory is read and written once.
#include "affine_chunk.h"

namespace starflow::STARFLOW_ISA {

namespace {

int64_t params_at(const Chunk& chunk) {
    return (chunk.row * chunk.call.T + chunk.first_source()) * chunk.call.P();
}

void gather(const Chunk& chunk, Scratch& room) {
    const AffineCall& call = chunk.call;
    int64_t at = params_at(chunk), size = chunk.tokens * call.P();
    fetch(call.params, call.params_format, call.flip ? at - size : at + size, size);
    chunk.gather(call.params, call.params_format, at, call.P(), room);
}

}  // namespace

void affine_flow(const AffineCall& call, int64_t first_chunk, int64_t last_chunk) {
    Scratch room;
    for (int64_t index = first_chunk; index < last_chunk; ++index) {
        Chunk chunk(call, index);
        gather(chunk, room);
        chunk.density(index, room);
    }
}

void affine_flow_backward(const AffineCall& call, int64_t first_chunk, int64_t last_chunk) {
    Scratch room;
    for (int64_t index = first_chunk; index < last_chunk; ++index) {
        Chunk chunk(call, index);
        gather(chunk, room);
        chunk.gradient(room);
        chunk.scatter(room, call.grad_params, call.params_format, params_at(chunk), call.P());
        if (chunk.identity < 0) continue;
        // The last parameters of the sequence belong to no token.
        memset(room.a, 0, call.D * sizeof(float));
        for (int64_t end = (chunk.row + 1) * call.T * call.P(), at = end - call.P(); at < end; at += call.D)
            write(call.grad_params, call.params_format, at, call.D, room.a);
    }
}

}  // namespace starflow::STARFLOW_ISA
