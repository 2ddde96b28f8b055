// A flow block on groups of sequences. The density direction takes the tokens in chunks, sampling takes them one by
// one. Both run the same code on the same kind of cache.
#include <algorithm>

#include "pass.h"

namespace starflow::STARFLOW_ISA {

namespace {

// Transforms the token. Every thread repeats this, which saves a barrier; the first one stores the log scales.
void transform(const Pass& pass) {
    const BlockCall& call = pass.call;
    int D = pass.spec.token_dim;
    int64_t P = padded(pass.spec.params_dim()), t = pass.target();
    for (int64_t b = 0; b < pass.sequences; ++b) {
        if (call.known && t < call.known[pass.first_sequence + b]) {
            memcpy(pass.ws.fresh + b * padded(D), pass.at(call.state, b, t), D * sizeof(float));
            continue;
        }
        const float* without = call.guidance ? pass.ws.params + (pass.sequences + b) * P : nullptr;
        float weight = call.guidance ? call.guidance[(pass.first_sequence + b) * call.T + t] : 0.0f;
        affine_inverse(pass.at(call.state, b, t), pass.ws.params + b * P, without, weight, D, call.rule,
                       pass.spec.affine, pass.ws.fresh + b * padded(D),
                       pass.team.rank ? nullptr : pass.at(call.log_sigma, b, t));
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

void run_block(const BlockCall& call, int64_t group, float* cache, float* shared, float* own, Team& team) {
    const Spec& spec = call.block->spec;
    int64_t first = group * call.group, sequences = call.B - first < call.group ? call.B - first : call.group;
    Workspace ws(spec, call.group * call.copies * call.chunk, call.L + call.T, shared, own);
    if (call.noise) {
        int64_t values = call.T * spec.token_dim, from = first * values;
        if (!team.rank) {
            memcpy(call.state + from, call.noise + from, sequences * values * sizeof *call.state);
            memset(call.log_sigma + from, 0, sequences * values * sizeof *call.log_sigma);
        }
        team.wait();
    }
    for (int64_t slot = call.first; slot < call.last;) {
        Pass pass{call, spec, team, ws, cache, first, sequences, slot, 1};
        if (pass.fills() || !call.state) {
            int64_t stop = slot < 0 ? 0 : pass.fills() ? call.filled : call.last;
            pass.n = std::min({call.chunk, stop - slot, call.last - slot});
        }
        pass.network();
        slot += pass.n;
        if (pass.fills()) continue;
        if (call.state && pass.continues()) write_token(pass, pass.target() - 1);
        pass.head();
        if (!call.state) continue;
        transform(pass);
        if (slot < call.last) continue;
        team.wait();
        write_token(pass, pass.target());
    }
    team.wait();
}

}  // namespace starflow::STARFLOW_ISA
