"""Flow head: the specification in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..affine_flow.reference import accumulation_dtype, affine_flow, params_gradient

RMS_EPS = 1e-6


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x rsqrt(mean x^2 + 1e-6) (1 + weight) over the last dimension, computed in float32 or wider."""
    y = x.to(accumulation_dtype(x.dtype))
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + RMS_EPS)
    return (y * (1 + weight.to(y.dtype))).to(x.dtype)


def normalized(h: torch.Tensor, weight: torch.Tensor, norm_weight: torch.Tensor | None) -> torch.Tensor:
    """Input of the projection."""
    return (h if norm_weight is None else rms_norm(h, norm_weight)).to(weight.dtype)


def flow_head(
    x: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    scale: str,
    soft_clip: float,
    shift: bool,
    flip: bool,
    logdet: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Final norm, projection to raw parameters, affine transform."""
    params = F.linear(normalized(h, weight, norm_weight), weight, bias)
    return affine_flow(x, params, scale, soft_clip, shift, flip, logdet)


def flow_head_backward(grads, outputs, x, h, weight, bias, norm_weight, *options) -> list[torch.Tensor]:
    """Gradients with respect to x, h, weight, bias and norm_weight; the raw parameters are computed anew."""
    y = normalized(h, weight, norm_weight)
    grad_x, grad_params = params_gradient(grads, outputs[0], x, F.linear(y, weight, bias), *options)
    wide = accumulation_dtype(h.dtype)
    found = [grad_x.to(x.dtype), None, grad_params.flatten(0, 1).T @ y.flatten(0, 1).to(grad_params.dtype)]
    if bias is not None:
        found.append(grad_params.sum((0, 1)))
    grad_h = (grad_params @ weight.to(grad_params.dtype)).to(wide)
    if norm_weight is not None:
        hw = h.to(wide)
        r = torch.rsqrt(hw.square().mean(-1, keepdim=True) + RMS_EPS)
        found.append((grad_h * hw * r).sum((0, 1)))
        grad_h = grad_h * (1 + norm_weight.to(wide))
        grad_h = r * grad_h - hw * r**3 * (grad_h * hw).mean(-1, keepdim=True)
    found[1] = grad_h
    inputs = (t for t in (x, h, weight, bias, norm_weight) if t is not None)
    return [g.to(t.dtype) for g, t in zip(found, inputs)]
