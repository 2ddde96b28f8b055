"""Flow head: the specification in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .._core.numerics import NORM_EPS, accumulation_dtype, norm_statistics, rms_norm
from ..affine_flow.reference import affine_flow, params_gradient


def normalized(h: torch.Tensor, weight: torch.Tensor, norm_weight: torch.Tensor | None) -> torch.Tensor:
    """Return the input of the projection: h, normalized if there is a norm, in the dtype of weight."""
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
    """Apply the final norm, the projection to raw parameters and the affine transform."""
    params = F.linear(normalized(h, weight, norm_weight), weight, bias)
    return affine_flow(x, params, scale, soft_clip, shift, flip, logdet)


def flow_head_backward(grads, outputs, x, h, weight, bias, norm_weight, *options) -> list[torch.Tensor]:
    """Return the gradients with respect to x, h, weight, bias and norm_weight; recomputes the raw parameters."""
    y = normalized(h, weight, norm_weight)
    grad_x, grad_params = params_gradient(grads, outputs[0], x, F.linear(y, weight, bias), *options)
    grad_h = (grad_params @ weight.to(grad_params.dtype)).to(accumulation_dtype(h.dtype))
    grad_norm = None
    if norm_weight is not None:
        wide, r = norm_statistics(h, "rms_norm", NORM_EPS["rms_norm"])
        grad_norm = (grad_h * wide * r).sum((0, 1))
        grad_h = grad_h * (1 + norm_weight.to(wide.dtype))
        grad_h = r * grad_h - wide * r**3 * (grad_h * wide).mean(-1, keepdim=True)
    grad_weight = grad_params.flatten(0, 1).T @ y.flatten(0, 1).to(grad_params.dtype)
    gradients = (
        (grad_x, x),
        (grad_h, h),
        (grad_weight, weight),
        (grad_params.sum((0, 1)), bias),
        (grad_norm, norm_weight),
    )
    return [grad.to(like.dtype) for grad, like in gradients if like is not None]
