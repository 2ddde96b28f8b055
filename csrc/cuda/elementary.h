// The functions between the products of a block, in float32.
#pragma once

#include "../spec.h"
#include "device.h"

namespace starflow::cuda {

STARFLOW_DEVICE float gelu(float x) { return 0.5f * x * erfcf(x * -0.70710678f); }

STARFLOW_DEVICE float gelu_tanh(float x) {
    return 0.5f * x * (1.0f + tanhf(0.79788456f * fmaf(0.044715f * x * x, x, x)));
}

// Returns softplus(a + 0.5413), which is 1 at a = 0.
STARFLOW_DEVICE float softplus_one(float a) {
    float x = a + 0.541324854612918f;
    return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x)));
}

STARFLOW_DEVICE float soft_clip(float r, float clip) { return clip == 0 ? r : clip * tanhf(r / clip); }

STARFLOW_DEVICE float sigma_of(float a, Scale scale) {
    return scale == Scale::exp ? expf(a) : scale == Scale::softplus ? softplus_one(a) : 1.0f;
}

STARFLOW_DEVICE float log_sigma_of(float a, float sigma, Scale scale) {
    if (scale == Scale::softplus) return a < -17.0f ? a + 0.541324854612918f : logf(sigma);
    return scale == Scale::exp ? a : 0.0f;
}

struct Gaussian {
    float mu, sigma, log_sigma;
};

STARFLOW_DEVICE Gaussian gaussian_of(float mu, float a, Scale scale) {
    float sigma = sigma_of(a, scale);
    return {mu, sigma, log_sigma_of(a, sigma, scale)};
}

// Returns mean and scale of dimension i of a token from its parameters; `without` is null without guidance. The rules
// are those of affine_flow_inverse.
STARFLOW_DEVICE Gaussian gaussian(const float* params, const float* without, float weight, int i, int D, Rule rule,
                                  const Affine& affine) {
    bool unit = affine.scale == Scale::unit;
    auto raw = [&](const float* from, bool scale) {
        return scale && unit ? 0.0f : soft_clip(from[scale || unit ? i : D + i], affine.clip);
    };
    float a = raw(params, true), b = raw(params, false);
    if (!without) return gaussian_of(b, a, affine.scale);
    float other_a = raw(without, true), other_b = raw(without, false);
    if (rule == Rule::tarflow)
        return gaussian_of(fmaf(weight, b - other_b, b), fmaf(weight, a - other_a, a), affine.scale);
    Gaussian g = gaussian_of(b, a, affine.scale);
    float other_sigma = sigma_of(other_a, affine.scale);
    if (rule == Rule::itarflow) {
        float sigma = fmaf(weight, g.sigma - other_sigma, g.sigma);
        return {fmaf(weight, b - other_b, b), sigma, logf(fabsf(sigma))};
    }
    float ratio = fminf(g.sigma / other_sigma, 1.0f);
    float ws = weight * ratio * ratio, precision = 1.0f + weight - ws;
    return {((1.0f + weight) * b - ws * other_b) / precision, g.sigma / sqrtf(precision),
            g.log_sigma - 0.5f * logf(precision)};
}

// Computes to = x / sqrt(mean x^2 + 1e-6) (1 + weight) by the lanes of a warp; to may be x.
STARFLOW_DEVICE void rms_norm(const float* x, const float* weight, int n, float* to) {
    float squares = 0;
    for (int i = thread_index() % WARP; i < n; i += WARP) squares = fmaf(x[i], x[i], squares);
    float scale = 1.0f / sqrtf(warp_sum(squares) / float(n) + 1e-6f);
    for (int i = thread_index() % WARP; i < n; i += WARP) to[i] = x[i] * scale * (1.0f + weight[i]);
}

STARFLOW_DEVICE void layer_norm(const float* x, const float* weight, const float* bias, int n, float* to) {
    float sum = 0, squares = 0;
    for (int i = thread_index() % WARP; i < n; i += WARP) sum += x[i];
    float mean = warp_sum(sum) / float(n);
    for (int i = thread_index() % WARP; i < n; i += WARP) squares = fmaf(x[i] - mean, x[i] - mean, squares);
    float scale = 1.0f / sqrtf(warp_sum(squares) / float(n) + 1e-5f);
    for (int i = thread_index() % WARP; i < n; i += WARP) to[i] = fmaf((x[i] - mean) * scale, weight[i], bias[i]);
}

}  // namespace starflow::cuda
