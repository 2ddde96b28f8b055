// Quasi-Newton steps of one sequence. A linear model, fitted to the last sweeps, predicts how the moves of a token's
// neighbors change its mean and log scale. The algorithm is that of solve_inverse/quasi_newton.py.
#pragma once

#include "kernels.h"
#include "vec.h"
#include "workspace.h"

namespace starflow::STARFLOW_ISA {

class QuasiNewton {
public:
    QuasiNewton(const Jacobi& solver, int64_t sequence, int64_t T, int64_t D)
        : solver(solver), D(D), width(padded(D)), inputs(solver.neighbours * D), columns(padded(inputs)) {
        float* at = solver.memory + sequence * solver.memory_floats(T, D);
        auto take = [&](int64_t count) {
            float* taken = at;
            at += count;
            return taken;
        };
        moves_ = take(T * width);
        outputs_ = take(T * 2 * width);
        gram = take(inputs * columns);
        factor = take(inputs * columns);
        cross = take(inputs * 2 * width);
        model = take(inputs * 2 * width);
        near = take(columns);
        changes = take(2 * width);
    }

    // Return the move of token t in the last sweep, and its mean and log scale then. Both are written after `learn`.
    float* moves(int64_t t) const { return moves_ + t * width; }
    float* outputs(int64_t t) const { return outputs_ + t * 2 * width; }

    // Fits the model to the tokens first .. last - 1, whose present outputs are rows of 2 padded D at `now`. The last
    // sweep moved the tokens from `moved` on.
    void learn(int64_t first, int64_t last, int64_t moved, const float* now) const {
        for (int64_t i = 0; i < inputs * columns; i += LANES) store(gram + i, splat(FORGET) * load(gram + i));
        for (int64_t i = 0; i < inputs * 2 * width; i += LANES) store(cross + i, splat(FORGET) * load(cross + i));
        float largest = 0;
        for (int64_t t = first; t < last; ++t) {
            float size = gather(t, moved);
            if (size > largest) largest = size;
        }
        for (int64_t t = first; t < last; ++t) {
            float size = gather(t, moved);
            if (size > SMALLEST_MOVE * SMALLEST_MOVE * largest) add(now + (t - first) * 2 * width, outputs(t), size);
        }
        solve();
    }

    // Returns the predicted change of token t by the moves of the tokens from `moved` on: of its mean, then its log
    // scale.
    const float* predict(int64_t t, int64_t moved) const {
        gather(t, moved);
        for (int64_t c = 0; c < 2 * width; c += LANES) {
            Vec sum = splat(0.0f);
            for (int64_t i = 0; i < inputs; ++i) sum = fma(splat(near[i]), load(model + i * 2 * width + c), sum);
            store(changes + c, sum);
        }
        return changes;
    }

private:
    // FORGET: factor by which the weight of a sweep falls in each later one. RIDGE: ridge of the regression, relative
    // to the mean square of the inputs.
    static constexpr float FORGET = 0.7f, RIDGE = 0.03f;
    // Tokens whose neighbors moved less than this share of the largest move are left out: their moves are rounding
    // errors.
    static constexpr float SMALLEST_MOVE = 1e-3f;

    const Jacobi& solver;
    int64_t D, width, inputs, columns;
    float *moves_, *outputs_, *gram, *factor, *cross, *model, *near, *changes;

    // Gathers the moves of the neighbors of token t side by side; returns the sum of their squares.
    float gather(int64_t t, int64_t moved) const {
        float size = 0;
        for (int64_t k = 0; k < solver.neighbours; ++k) {
            const float* from = t - solver.offsets[k] >= moved ? moves(t - solver.offsets[k]) : nullptr;
            for (int64_t i = 0; i < D; ++i) {
                float move = from ? from[i] : 0.0f;
                near[k * D + i] = move;
                size += move * move;
            }
        }
        return size;
    }

    // Adds a token to the regression. Every token has the same weight, however far it is from its solution.
    void add(const float* now, const float* before, float size) const {
        for (int64_t c = 0; c < 2 * width; c += LANES) store(changes + c, load(now + c) - load(before + c));
        for (int64_t half = 0; half < 2; ++half)
            for (int64_t i = 0; i < D; ++i)
                if (float change = changes[half * width + i]; change - change != 0) return;
        for (int64_t i = 0; i < inputs; ++i) {
            Vec weight = splat(near[i] / size);
            float *squares = gram + i * columns, *products = cross + i * 2 * width;
            for (int64_t c = 0; c < columns; c += LANES)
                store(squares + c, fma(weight, load(near + c), load(squares + c)));
            for (int64_t c = 0; c < 2 * width; c += LANES)
                store(products + c, fma(weight, load(changes + c), load(products + c)));
        }
    }

    // Computes row -= scale * other, from the tile of column `first` on.
    static void subtract(float* row, const float* other, float scale, int64_t first, int64_t end) {
        for (int64_t c = first / LANES * LANES; c < end; c += LANES)
            store(row + c, fma(splat(-scale), load(other + c), load(row + c)));
    }

    // Computes model = (gram + ridge)^-1 cross by Cholesky, U^T U. If that fails, the model stays as it is.
    void solve() const {
        float mean = 0;
        for (int64_t i = 0; i < inputs; ++i) mean += gram[i * columns + i] / float(inputs);
        if (!(mean > 0)) return;
        memcpy(factor, gram, inputs * columns * sizeof(float));
        for (int64_t j = 0; j < inputs; ++j) factor[j * columns + j] += RIDGE * mean;
        for (int64_t j = 0; j < inputs; ++j) {
            float *row = factor + j * columns, pivot = row[j];
            if (!(pivot > 0 && pivot - pivot == 0)) return;
            float inverse = 1.0f / __builtin_sqrtf(pivot);
            for (int64_t c = j; c < inputs; ++c) row[c] *= inverse;
            for (int64_t i = j + 1; i < inputs; ++i) subtract(factor + i * columns, row, row[i], i, columns);
        }
        memcpy(model, cross, inputs * 2 * width * sizeof(float));
        for (int64_t j = 0; j < inputs; ++j) {
            float *row = model + j * 2 * width, inverse = 1.0f / factor[j * columns + j];
            for (int64_t c = 0; c < 2 * width; ++c) row[c] *= inverse;
            for (int64_t i = j + 1; i < inputs; ++i)
                subtract(model + i * 2 * width, row, factor[j * columns + i], 0, 2 * width);
        }
        for (int64_t j = inputs - 1; j >= 0; --j) {
            float *row = model + j * 2 * width, inverse = 1.0f / factor[j * columns + j];
            for (int64_t i = j + 1; i < inputs; ++i)
                subtract(row, model + i * 2 * width, factor[j * columns + i], 0, 2 * width);
            for (int64_t c = 0; c < 2 * width; ++c) row[c] *= inverse;
        }
    }
};

}  // namespace starflow::STARFLOW_ISA
