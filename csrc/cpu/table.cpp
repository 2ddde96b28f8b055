// The kernels of one instruction set.
#include "kernels.h"

namespace starflow::STARFLOW_ISA {

void run_block(const BlockCall&, int64_t, float*, float*, float*, Team&);
void run_jacobi(const BlockCall&, int64_t, float*, float*, float*, Team&);
void run_transposed(const BlockCall&, int64_t, float*, float*, float*, Team&);
void affine_flow(const AffineCall&, int64_t, int64_t);
void affine_flow_backward(const AffineCall&, int64_t, int64_t);
void affine_flow_inverse(const InverseCall&, int64_t, int64_t);
void flow_head(const HeadCall&, int64_t, int64_t);
void flow_head_backward(const HeadCall&, int64_t, int64_t);
void cached_attention(const AttentionCall&, int64_t, int64_t, float*);
void causal_attention(const AttentionCall&, int64_t, int64_t, float*);
void causal_attention_backward(const AttentionCall&, int64_t, int64_t, float*);
void layer_enter(const LayerCall&, int64_t, int64_t, float*);
void layer_leave(const LayerCall&, int64_t, int64_t, float*);
void layer_enter_backward(const LayerCall&, int64_t, int64_t, float*, float*);
void layer_leave_backward(const LayerCall&, int64_t, int64_t, float*, float*);
void pack(const LinearCall&, int64_t, int64_t);
void linear(const LinearCall&, int64_t, int64_t, float*);
void linear_weight_gradient(const LinearCall&, int64_t, int64_t);
void masked_inverse(const MaskedCall&, int64_t, int64_t, void*);
void run_elementary(Elementary, const float*, float*, int64_t);
uint64_t fingerprint(const Bytes*, int64_t);

extern const Kernels kernels;
const Kernels kernels{
    .name = STARFLOW_ISA_NAME,
    .run_block = run_block,
    .run_jacobi = run_jacobi,
    .run_transposed = run_transposed,
    .affine_flow = affine_flow,
    .affine_flow_backward = affine_flow_backward,
    .affine_flow_inverse = affine_flow_inverse,
    .flow_head = flow_head,
    .flow_head_backward = flow_head_backward,
    .cached_attention = cached_attention,
    .causal_attention = causal_attention,
    .causal_attention_backward = causal_attention_backward,
    .layer_enter = layer_enter,
    .layer_leave = layer_leave,
    .layer_enter_backward = layer_enter_backward,
    .layer_leave_backward = layer_leave_backward,
    .pack = pack,
    .linear = linear,
    .linear_weight_gradient = linear_weight_gradient,
    .masked_inverse = masked_inverse,
    .elementary = run_elementary,
    .fingerprint = fingerprint,
};

}  // namespace starflow::STARFLOW_ISA
