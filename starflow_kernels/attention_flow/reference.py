"""Flow with one attention layer: the specification in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..affine_flow.reference import affine_flow, params_gradient
from ..causal_attention.reference import causal_attention, causal_attention_backward


def attention_flow(
    x: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    rotary: str,
    window: int,
    temperature: float,
    *options,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Apply attention, projection and affine transform; return z, the log-determinant and the scores' log-sum-exp."""
    out, lse = causal_attention(q, k, v, cos, sin, rotary, window, temperature)
    return *affine_flow(x, F.linear(out.flatten(2), weight, bias), *options), lse


def attention_flow_backward(
    grads, outputs, x, q, k, v, weight, bias, cos, sin, rotary, window, temperature, *options
) -> list[torch.Tensor]:
    """Return the gradients with respect to x, q, k, v, weight and bias; recomputes attention and parameters."""
    attention = q, k, v, cos, sin, rotary, window, temperature
    (*flow_grads, grad_lse), (z, _, lse) = grads, outputs
    out, _ = causal_attention(*attention)
    h = out.flatten(2)
    grad_x, grad_params = params_gradient(flow_grads, z, x, F.linear(h, weight, bias), *options)
    grad_out = (grad_params @ weight.to(grad_params.dtype)).view(out.shape)
    gradients = [grad_x, *causal_attention_backward([grad_out, grad_lse], [out, lse], *attention)]
    gradients.append(grad_params.flatten(0, 1).T @ h.flatten(0, 1).to(grad_params.dtype))
    if bias is not None:
        gradients.append(grad_params.sum((0, 1)))
    inputs = (t for t in (x, q, k, v, weight, bias) if t is not None)
    return [grad.to(like.dtype) for grad, like in zip(gradients, inputs)]
