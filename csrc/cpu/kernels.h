// Arguments of the kernels, and the table of kernels per instruction set. All of it is plain data, so that no library
// code is compiled for an instruction set that the machine may lack.
#pragma once

#include <cstdint>

#include "../spec.h"
#include "team.h"

namespace starflow {

// Packed weight, (out, in), and padded bias, null for none. following: the layer that is multiplied next, or null.
struct Linear {
    const void* weight;
    const float* bias;
    int in, out;
    const Linear* following;
};

struct NormWeights {
    const float *weight, *bias;
};

// A gated MLP.
struct Transition {
    Linear gate, up, down;
};

struct Layer {
    NormWeights attn_norm, mlp_norm, q_layer_norm, k_layer_norm;
    Linear qkv, proj, gate, up, down;
    Transition transition;
    const float *q_norm, *k_norm, *attn_post_norm, *mlp_post_norm;
};

struct Block {
    Spec spec;
    Linear proj_in, proj_text, proj_out;
    const float *positions, *start, *final_norm;
    const Layer* layers;
};

// Progress of a sequence. done: number of final tokens. single: tokens before this one are solved one by one. passes:
// passes so far. fallbacks: windows that fell back to single tokens. failed: 1 + the first token without a finite
// value, or 0. last_first, last_end: the window of the last sweep.
struct Place {
    int64_t done, single, passes, fallbacks, failed, last_first, last_end;
};

// Jacobi sweeps over windows of tokens, see block/jacobi.py; every sequence is a group of its own.
struct Jacobi {
    const float* noise;  // (B, T, D); the call's state holds the current values
    int64_t window;
    bool slide;
    float tol;
    int64_t neighbours;      // 0: plain sweeps
    const int64_t* offsets;  // of the neighbours, ascending
    float* memory;           // (B, memory_floats()): the quasi-Newton model, zeros at first
    int64_t passes;          // most passes of this call
    Place* places;           // (B,)
    int32_t* sweeps;         // (B, T): passes in which each token took part
    float* residual;         // (B,): largest change of a token in the pass that accepted it

    // Returns the floats of a model of D values per token, see quasi_newton.h.
    int64_t memory_floats(int64_t T, int64_t D) const {
        int64_t inputs = neighbours * D, width = (D + 15) / 16 * 16, columns = (inputs + 15) / 16 * 16;
        return 3 * T * width + inputs * (2 * columns + 4 * width) + columns + 2 * width;
    }
};

// Solve of J^T u = g after a density pass. The matrices are the transposed ones of the block, with zeros as biases.
struct Transposed {
    struct Layer {
        Linear qkv, proj, gate, up, down;
    };
    Linear proj_in, proj_out;
    const Layer* layers;
    const float* g;  // (B, T, D)
    float* u;        // (B, T, D); tokens not reached yet hold what later tokens add to J^T u, zeros at first
    float* heads;    // HeadGradients of every row, layer and key head
};

// One call on B sequences of T tokens with L text states in front. Under guidance, sampling has 2B rows: row b with
// the condition, row B + b without.
struct BlockCall {
    const Block* block;
    int64_t B, T, L;
    int copies;           // rows per sequence: 2 under guidance
    int64_t cond_slots;   // T for a condition per token, 1 for one per row
    const float* input;   // density: (B, T, D) data
    float* state;         // sampling: (B, T, D), noise that becomes data
    const float* noise;   // sampling without a further call: (B, T, D) noise, which the state takes first; else null
    float* log_sigma;     // sampling: (B, T, D) log scales of the tokens that are computed; with `noise`, else zero
    float* params;        // density: (B, T, P) raw parameters
    const float* cond;    // (copies B, cond_slots, cond_dim) or null
    const float* prefix;  // (copies B, L, text_dim) or null
    const float *cos, *sin;
    const float* guidance;  // (B, T) or null
    Rule rule;
    float temperature;
    const Jacobi* jacobi;  // sampling by Jacobi, else null
    // The density pass before a transposed solve keeps values, see transposed.h, and a second cache in which keys and
    // values are exchanged; else null.
    float *kept, *exchanged;
    const Transposed* transposed;  // transposed solve, else null
    float* cache;  // cache_floats(spec, L + T) per row: copies B rows if one_cache(), else per thread copies group rows
    const int64_t* known;  // sampling: (B,) numbers of first tokens that are data in the state; or null
    int64_t filled;        // sampling: slots whose inputs are all known; they only fill the cache
    int64_t first, last;   // slots to run, the prefix being slots -L .. -1
    int64_t group;         // sequences per group
    int64_t chunk;         // slots per pass where the inputs are known

    // Returns whether the rows of all groups have their own places in the cache, which later calls read.
    bool one_cache() const { return (state && !noise) || kept; }
};

// Largest number of values per token that the affine kernels take, see affine_flow/native.py.
constexpr int64_t MAX_TOKEN_DIM = 8192;

enum class Logdet { sum, mean, none };
enum class Format { float32, bfloat16, float16 };

// The affine transform of x (B, T, D) by raw parameters (B, T, P) in the density direction, and its gradient.
struct AffineCall {
    int64_t B, T;
    int D;
    Affine affine;
    bool shift, flip;
    Logdet logdet;
    Format x_format, params_format;  // z and the gradients have the format of what they belong to
    const void *x, *params;
    void* z;          // (B, T, D)
    float* logdets;   // (B, T, D) for Logdet::none, else unused
    double* partial;  // (B, chunks()): sums of log sigma, unused for Logdet::none
    // For the gradient only; grad_z and grad_logdet may be null.
    const void *saved_z, *grad_z;
    const float* grad_logdet;
    void *grad_x, *grad_params;

    // Tokens that are transformed together. It depends only on the shape of one sequence, so the bits of a row do too.
    int64_t chunk;

    int P() const { return affine.scale == Scale::unit ? D : 2 * D; }
    int64_t chunks() const { return (T + chunk - 1) / chunk; }
};

// Largest number of parameters per token for which products run along the channels, see narrow.h.
constexpr int64_t NARROW_HEAD = 8;

// Norm, projection and the affine transform of h (B, T, C), float32; `affine` has no parameters of its own.
struct HeadCall {
    AffineCall affine;
    int C;
    const float* h;  // (B, T, C)
    bool norm;       // the weights have the factor 1 + norm weight in them
    // Padded; packed as in product.h, (P, C), or as in narrow.h, (outputs(), C). weight is null in a narrow head.
    const float *weight, *across, *bias;
    float* room;  // room_floats() per thread
    // For the gradient only. The last two are sums over tokens, zero at first. grad_weight (padded P, padded C):
    // gradients times states over their root mean square. grad_bias (2, padded P): sums, then their rounding errors.
    float *grad_h, *grad_weight, *grad_bias;

    bool narrow() const { return affine.P() <= NARROW_HEAD; }
    int64_t outputs() const { return narrow() ? (affine.P() + 7) / 8 * 8 : affine.P(); }
    int64_t room_floats() const {
        int64_t rows = affine.chunk, P = affine.P(), wide_C = (C + 15) / 16 * 16, wide_P = (P + 15) / 16 * 16;
        return rows * (wide_C + 2 * wide_P + P + 2) + (rows > P ? rows : P) * 64;
    }
};

// y (M, N) = x (M, K) weight^T + bias, float32.
struct LinearCall {
    int64_t M, N, K;
    const float *x, *weight;  // weight (N, K), or (K, N) if `across`
    bool across;
    float* packed;       // the weight, packed as in product.h
    const float* bias;   // (N,) or null
    float* y;            // dL/dy in the gradient
    float* grad_weight;  // (N, K)
    float* grad_bias;    // (N,) or null
    bool add;            // whether to add to the gradients
    int64_t stride;      // of the rows of y in the product
    bool sigmoid;        // whether the product ends in a sigmoid
};

// Rows that the kernels of a layer take at a time.
constexpr int64_t LAYER_ROWS = 48;

// A transformer layer on M rows (tokens) in training, and its gradient. Every tensor has a row per token.
struct LayerCall {
    Norm norm;
    NormWeights attn_norm, mlp_norm;             // padded; the weight is the factor of the norm
    Linear qkv, proj, up, down;                  // in the gradient: transposed, without bias
    const float *h, *drop_attention, *drop_mlp;  // (M, C); factors of the branches, or null
    float *qkv_values, *attended, *mid, *pre;  // kept; mid: states between the branches, pre: hidden values before GELU
    float* out;
    // For the gradient only. branch_*: gradients of the products that end a branch, unlike the others only with dropout.
    // normed, normed_mid: only with a norm.
    const float* grad_out;
    float *branch_attention, *branch_mlp, *normed, *normed_mid, *hidden;
    float *grad_h, *grad_qkv, *grad_attended, *grad_mid, *grad_pre;

    // Returns the floats of scratch per thread.
    int64_t floats() const {
        int64_t channels = out ? down.out : down.in, hidden_values = out ? up.out : up.in;
        return LAYER_ROWS * (channels + hidden_values + 64) + 64;
    }
};

// The inverse transform of B sequences of n tokens. Under guidance, the parameters of the B rows with the condition
// come first, then those of the B rows without.
struct InverseCall {
    int64_t B, n;
    int D;
    Affine affine;
    Rule rule;
    Format format, params_format;
    const void *z, *params;
    const float* guidance;                   // (B, n) or null
    void* x;                                 // of the format of z
    int64_t z_row, z_token, x_row, x_token;  // strides
};

// A tensor (B, T, heads, d); the d values of a head are adjacent.
struct Heads {
    void* data;
    int64_t batch, token, head;  // strides

    int64_t index(int64_t b, int64_t t, int64_t h) const { return b * batch + t * token + h * head; }
    float* at(int64_t b, int64_t t, int64_t h) const { return static_cast<float*>(data) + index(b, t, h); }
};

// Causal attention of T tokens over themselves and, if there is a cache, over the tokens in it.
struct AttentionCall {
    int64_t B, T, window;  // window 0: none
    int H, H_kv, d;
    float scale;    // of the scores
    Format format;  // of all heads; float32 with a cache
    Rotary rotary;
    const float *cos, *sin;  // (positions, d / 2)
    Heads q, k, v, out;
    float* lse;  // (B, H, T)
    // For cached attention only. Rows hold `lengths` tokens (B,) before the new ones, and have room for S.
    Heads k_cache, v_cache;
    const int32_t* lengths;
    int64_t S;
    // For the gradient only; the gradients of the outputs may be null.
    Heads grad_out, grad_q, grad_k, grad_v;
    const float* grad_lse;

    // Returns the first key that the query at position t sees.
    int64_t first_key(int64_t t) const { return window && t >= window ? t - window + 1 : 0; }
};

// Names of masked_inverse/network.py, in their order.
enum class Activation { identity, relu, leaky_relu, elu, tanh, sigmoid, silu, gelu, gelu_tanh, softplus };
enum class Univariate { soft_clip, softplus, sigmoid, clamp, convex, spline_soft_clip, spline_softmax };

// One layer of a masked network. Its units are sorted by the step in which they are ready.
struct MaskedLayer {
    int64_t rows, columns;
    const void *weight, *offset;          // (rows, columns) and (rows,)
    Activation activation;                // of the inputs
    int64_t skip;                         // layer whose outputs are added, or -1
    int64_t sample_offset, sample_scale;  // first columns of the values per sample, or -1
    const int64_t* unit;                  // (rows,): unit of each row
    const int64_t* skip_row;              // (rows,): row of the layer `skip`
    const int64_t* ready;                 // (steps,): rows that are ready after each step
    int64_t input, output;                // places in the workspace, in rows
};

// Inverse of an autoregressive transform of y (B, D); P parameters per feature.
struct MaskedCall {
    int64_t B, D, P, steps, count_layers;
    bool is_double;
    const MaskedLayer* layers;
    const int64_t* column;  // (D,): features by the step in which they are solved
    const int64_t* solved;  // (steps + 1,): features solved before each step
    const void* samples;    // (B, samples_width): offsets and scales per sample
    int64_t samples_width;
    int64_t params;     // place in the workspace of P + 2 rows
    int64_t work_rows;  // rows of the workspace
    const void* y;
    void *x, *logdet;  // (B, D) and (B,)
    Univariate kind;
    // Constants of the map, see network.py.
    bool scale_first;
    double inverse_log_slope, epsilon, bias, low, high;
    int64_t bins;  // 0 for an affine map
    double bound, min_width, min_height, min_derivative, inverse_divisor;
};

// Most samples that are solved together, and so the values of a row of the workspace.
constexpr int64_t MASKED_SAMPLES = 32;

enum class Elementary { exp, log, log1p, tanh, gelu, gelu_tanh, softplus_one };

struct Bytes {
    const char* first;
    int64_t count;
};

struct Kernels {
    const char* name;
    // Runs one group of sequences; every member of the team calls it. cache: cache of the call's row 0 in sampling,
    // else of the group's row 0. shared: workspace of the team's first thread. own: workspace of the member.
    void (*run_block)(const BlockCall& call, int64_t group, float* cache, float* shared, float* own, Team& team);
    // Does the same for one sequence by Jacobi.
    void (*run_jacobi)(const BlockCall& call, int64_t sequence, float* cache, float* shared, float* own, Team& team);
    // Solves for the slots first .. last - 1 of one group, the last one first.
    void (*run_transposed)(const BlockCall& call, int64_t group, float* cache, float* shared, float* own, Team& team);
    // Runs the chunks first .. last - 1 of all B chunks().
    void (*affine_flow)(const AffineCall& call, int64_t first, int64_t last);
    void (*affine_flow_backward)(const AffineCall& call, int64_t first, int64_t last);
    // Runs the tokens first .. last - 1 of all B n.
    void (*affine_flow_inverse)(const InverseCall& call, int64_t first, int64_t last);
    void (*flow_head)(const HeadCall& call, int64_t first, int64_t last);
    // Adds the part of these chunks to the sums over tokens.
    void (*flow_head_backward)(const HeadCall& call, int64_t first, int64_t last);
    // Runs the key heads first .. last - 1 of all B H_kv. scratch: zeros, of the size in attention_sizes.h.
    void (*cached_attention)(const AttentionCall& call, int64_t first, int64_t last, float* scratch);
    void (*causal_attention)(const AttentionCall& call, int64_t first, int64_t last, float* scratch);
    void (*causal_attention_backward)(const AttentionCall& call, int64_t first, int64_t last, float* scratch);
    // Run up to LAYER_ROWS rows of a layer before or after its attention. The gradients add their sums over rows for
    // weight and bias of the norm, each padded, to `totals`.
    void (*layer_enter)(const LayerCall& call, int64_t first, int64_t last, float* scratch);
    void (*layer_leave)(const LayerCall& call, int64_t first, int64_t last, float* scratch);
    void (*layer_enter_backward)(const LayerCall& call, int64_t first, int64_t last, float* scratch, float* totals);
    void (*layer_leave_backward)(const LayerCall& call, int64_t first, int64_t last, float* scratch, float* totals);
    // Packs tiles of 16 outputs of the weight into `packed`.
    void (*pack)(const LinearCall& call, int64_t first_tile, int64_t last_tile);
    // Runs the rows first .. last - 1. scratch: 64 floats per row.
    void (*linear)(const LinearCall& call, int64_t first_row, int64_t last_row, float* scratch);
    // Computes the gradients of weight and bias, sums over all rows, for the outputs first .. last - 1.
    void (*linear_weight_gradient)(const LinearCall& call, int64_t first, int64_t last);
    // Solves the samples first .. last - 1. work: work_rows rows of MASKED_SAMPLES values.
    void (*masked_inverse)(const MaskedCall& call, int64_t first, int64_t last, void* work);
    void (*elementary)(Elementary which, const float* x, float* y, int64_t n);
    // Returns a digest of n pieces of memory.
    uint64_t (*fingerprint)(const Bytes* pieces, int64_t n);
};

// Returns the kernels for the widest instruction set of this processor, or for the one that STARFLOW_ISA names.
const Kernels& kernels();

// Returns whether these kernels and the processor have products of bfloat16 values with sums in float32.
bool has_bf16_products();

}  // namespace starflow
