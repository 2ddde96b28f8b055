// Sampling of one sequence by Jacobi sweeps over a window of tokens. One pass over the cache gives all of them new
// values, and the tokens at the front that no longer change are final. The algorithm is that of block/jacobi.py.
#include <algorithm>

#include "pass.h"
#include "quasi_newton.h"

namespace starflow::STARFLOW_ISA {

namespace {

// A window has diverged where its values exceed this multiple of the largest noise.
constexpr float DIVERGED = 1e6f;

// Returns the largest absolute value, or NaN if there is a NaN.
float largest(const float* values, int64_t count) {
    float most = 0;
    for (int64_t i = 0; i < count; ++i) {
        float size = __builtin_fabsf(values[i]);
        if (!(size <= most)) most = size;
        if (most != most) return most;
    }
    return most;
}

struct Window {
    const Pass& pass;
    const Jacobi& solver;
    const QuasiNewton& model;
    int64_t first;                    // first token of the window; it has pass.n tokens
    float *fresh, *spread, *outputs;  // rows of padded D: mu + sigma z, sigma z; of 2 padded D: mu, log sigma

    int64_t D() const { return pass.spec.token_dim; }
    int64_t width() const { return padded(D()); }
    float* state(int64_t i) const { return pass.at(pass.call.state, 0, first + i); }

    // Computes mu + sigma z; returns its largest absolute value, or NaN.
    float transform() const {
        const BlockCall& call = pass.call;
        int64_t P = padded(pass.spec.params_dim());
        float most = 0;
        for (int64_t i = 0; i < pass.n; ++i) {
            const float* without = call.guidance ? pass.ws.params + (pass.n + i) * P : nullptr;
            float weight = call.guidance ? call.guidance[pass.first_sequence * call.T + first + i] : 0.0f;
            const float* noise = pass.at(solver.noise, 0, first + i);
            for (int c = 0; c < D(); c += LANES) {
                Gaussian g =
                    gaussian_at(pass.ws.params + i * P, without, weight, c, int(D()), call.rule, pass.spec.affine);
                Vec z = load(noise + c, int(D()) - c);
                store(fresh + i * width() + c, fma(g.sigma, z, g.mu));
                store(pass.at(call.log_sigma, 0, first + i) + c, g.log_sigma, int(D()) - c);
                if (!solver.neighbours) continue;
                store(spread + i * width() + c, g.sigma * z);
                store(outputs + i * 2 * width() + c, g.mu);
                store(outputs + (i * 2 + 1) * width() + c, g.log_sigma);
            }
            float size = largest(fresh + i * width(), D());
            if (!(size <= most)) most = size;
            if (most != most) return most;
        }
        return most;
    }

    float change(int64_t i, int64_t c) const { return __builtin_fabsf(fresh[i * width() + c] - state(i)[c]); }

    // Returns how many tokens are final: a token is final if none before it changed by more than the tolerance.
    int64_t accept(float& residual) const {
        int64_t i = 0;
        for (; i + 1 < pass.n; ++i) {
            float most = 0;
            for (int64_t c = 0; c < D(); ++c)
                most = std::max(most, change(i, c) / std::max(1.0f, __builtin_fabsf(fresh[i * width() + c])));
            if (most > solver.tol) break;
            residual = std::max(residual, most);
        }
        return i + 1;
    }

    // Turns the step from the state to the fresh values into a quasi-Newton step.
    void predict(const Place& place) const {
        int64_t known = place.last_end < first + pass.n ? place.last_end : first + pass.n;
        if (known > first) model.learn(first, known, place.last_first, outputs);
        // The predictions of an unstable model grow from token to token; the largest change bounds them.
        float most = 0;
        for (int64_t i = 0; i < pass.n; ++i)
            for (int64_t c = 0; c < D(); ++c) most = std::max(most, change(i, c));
        for (int64_t i = 0; i < pass.n; ++i) {
            float *to = fresh + i * width(), *moves = model.moves(first + i);
            const float* by = model.predict(first + i, first);
            for (int64_t c = 0; c < D(); ++c)
                to[c] += std::clamp(by[c] + spread[i * width() + c] * by[width() + c], -most, most);
            for (int64_t c = 0; c < D(); ++c) moves[c] = to[c] - state(i)[c];
            memcpy(model.outputs(first + i), outputs + i * 2 * width(), 2 * width() * sizeof(float));
        }
    }

    void update(Place& place, float bound) const {
        int64_t sequence = pass.first_sequence, accepted = 0;
        float size = transform();
        if (size <= bound || (pass.n == 1 && size - size == 0)) {
            accepted = accept(solver.residual[sequence]);
            if (solver.neighbours) predict(place);
        } else if (pass.n == 1) {
            place.failed = first + 1;
        } else {
            place.single = first + pass.n;
            ++place.fallbacks;
        }
        for (int64_t i = 0; i < pass.n; ++i) {
            if (accepted) memcpy(state(i), fresh + i * width(), D() * sizeof(float));
            ++solver.sweeps[sequence * pass.call.T + first + i];
        }
        place.last_first = first;
        place.last_end = accepted ? first + pass.n : first;
        place.done += accepted;
        ++place.passes;
    }
};

}  // namespace

void run_jacobi(const BlockCall& call, int64_t sequence, float* cache, float* shared, float* own, Team& team) {
    const Spec& spec = call.block->spec;
    const Jacobi& solver = *call.jacobi;
    int64_t T = call.T;
    Workspace ws(spec, call.copies * solver.window, call.L + T, shared, own);
    QuasiNewton model(solver, sequence, T, spec.token_dim);
    float bound = largest(solver.noise + sequence * T * spec.token_dim, T * spec.token_dim);
    bound = DIVERGED * (bound > 1 ? bound : 1);
    // Between the barriers, only the first thread writes the progress of the sequence.
    Place& place = solver.places[sequence];
    for (int64_t pass = 0; pass < solver.passes && place.done < T && !place.failed; ++pass) {
        int64_t first = place.done,
                end = solver.slide ? first + solver.window : (first / solver.window + 1) * solver.window;
        int64_t n = first < place.single ? 1 : (end < T ? end : T) - first;
        Pass network{call, spec, team, ws, cache, sequence, 1, spec.start ? first : first - 1, n};
        network.network();
        network.head();
        if (!team.rank) Window{network, solver, model, first, ws.fresh, ws.spread, ws.outputs}.update(place, bound);
        team.wait();
    }
}

}  // namespace starflow::STARFLOW_ISA
