// The affine transform in the density direction, and its gradient. The parameters of a chunk of tokens are gathered
// into two rows a and b in the order of x, with shift and flip undone. Memory is read and written once.
#include "affine_chunk.h"

namespace starflow::STARFLOW_ISA {

namespace {

int64_t params_at(const Chunk& chunk) { return (chunk.row * chunk.call.T + chunk.first_source()) * chunk.call.P(); }

void gather(const Chunk& chunk, Scratch& room) {
    const AffineCall& call = chunk.call;
    chunk.gather(call.params, call.params_format, params_at(chunk), call.P(), room);
}

// Prefetches the next chunk while this one is computed, one cache line per vector: a burst of prefetches would stall,
// and the hardware does not prefetch tokens in reverse order.
template <bool GRADIENT>
struct NextChunk {
    const AffineCall& call;
    int64_t at_params, at;

    explicit NextChunk(const Chunk& chunk) : call(chunk.call) {
        int64_t size = chunk.tokens * call.P();
        at_params = params_at(chunk) + (call.flip ? -size : size);
        at = chunk.at(chunk.begin) + chunk.size();
    }
    template <bool WRITE>
    INLINE static void fetch(const void* values, Format format, int64_t at) {
        __builtin_prefetch(static_cast<const char*>(values) + at * (format == Format::float32 ? 4 : 2), WRITE);
    }
    INLINE void params(int64_t i) const {
        fetch<false>(call.params, call.params_format, at_params + i);
        if (GRADIENT) fetch<true>(call.grad_params, call.params_format, at_params + i);
    }
    INLINE void rows(int64_t i) const {
        fetch<false>(GRADIENT ? call.saved_z : call.x, call.x_format, at + i);
        fetch<true>(GRADIENT ? call.grad_x : call.z, call.x_format, at + i);
        if (GRADIENT && call.grad_z) fetch<false>(call.grad_z, call.x_format, at + i);
    }
};

}  // namespace

void affine_flow(const AffineCall& call, int64_t first_chunk, int64_t last_chunk) {
    Scratch room;
    for (int64_t index = first_chunk; index < last_chunk; ++index) {
        Chunk chunk(call, index);
        gather(chunk, room);
        chunk.density(index, room, NextChunk<false>(chunk));
    }
}

void affine_flow_backward(const AffineCall& call, int64_t first_chunk, int64_t last_chunk) {
    Scratch room;
    for (int64_t index = first_chunk; index < last_chunk; ++index) {
        Chunk chunk(call, index);
        gather(chunk, room);
        chunk.gradient(room, NextChunk<true>(chunk));
        chunk.scatter(room, call.grad_params, call.params_format, params_at(chunk), call.P());
        if (chunk.identity < 0) continue;
        // The last parameters of the sequence belong to no token.
        memset(room.a, 0, call.D * sizeof(float));
        for (int64_t end = (chunk.row + 1) * call.T * call.P(), at = end - call.P(); at < end; at += call.D)
            write(call.grad_params, call.params_format, at, call.D, room.a);
    }
}

}  // namespace starflow::STARFLOW_ISA
