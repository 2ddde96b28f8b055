// A flow block on groups of sequences. The density direction takes the tokens in chunks, sampling takes them one by
// one. Both run the same code on the same kind of cache.
#include "pass.h"

namespace starflow::STARFLOW_ISA {

namespace {

// Transforms the token. Every thread repeats this, which saves a barrier.
void transform(const Pass& pass) {
    const BlockCall& call = pass.call;
    int D = pass.spec.token_dim;
    int64_t P = padded(pass.spec.params_dim()), t = pass.target();
    for (int64_t b = 0; b < pass.sequences; ++b) {
        const float* without = call.guidance ? pass.ws.params + (pass.sequences + b) * P : nullptr;
        float weight = call.guidance ? call.guidance[(pass.first_sequence + b) * call.T + t] : 0.0f;
        affine_inverse(pass.at(call.state, b, t), pass.ws.params + b * P, without, weight, D, call.rule,
                       pass.spec.affine, pass.ws.fresh + b * padded(D));
    }
}

// Writes the token that the previous slot computed; by now all threads have read their noise.
void write_token(const Pass& pass, int64_t t) {
    if (pass.team.rank) return;
    int D = pass.spec.token_dim;
    for (int64_t b = 0; b < pass.sequences; ++b)
        memcpy(pass.at(pass.call.state, b, t), pass.ws.fresh + b * padded(D), D * sizeof *pass.call.state);
}

}  // namespace

void run_block(const BlockCall& call, int64_t group, float* cache, float* shared, float* own, const Team& team) {
    const Spec& spec = call.block->spec;
    int64_t first = group * call.group, sequences = call.B - first < call.group ? call.B - first : call.group;
    Workspace ws(spec, call.group * call.copies * call.chunk, call.L + call.T, shared, own);
    for (int64_t slot = call.first; slot < call.last;) {
        int64_t end = slot < 0 && call.last > 0 ? 0 : call.last;
        int64_t n = slot >= 0 && call.state ? 1 : end - slot < call.chunk ? end - slot : call.chunk;
        Pass pass{call, spec, team, ws, cache, first, sequences, slot, n};
        pass.network();
        if (slot >= 0) {
            if (call.state && slot > call.first && slot > 0) write_token(pass, pass.target() - 1);
            pass.head();
            if (call.state) transform(pass);
        }
        slot += n;
        if (slot < call.last || !call.state || slot <= 0) continue;
        team.wait();
        write_token(pass, pass.target());
    }
    team.wait();
}

}  // namespace starflow::STARFLOW_ISA
