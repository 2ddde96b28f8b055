"""Flow head composed of the ops `residual_norm` and `affine_flow`, with torch's matrix products between them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .._core.dispatch import choose, run
from .._core.numerics import NORM_EPS

NORM = "rms_norm", NORM_EPS["rms_norm"]


def refuse(x, h, weight, bias, norm_weight, *options) -> str | None:
    """Return why the ops should not run these arguments, or None."""
    params = weight.new_empty(1).expand(*x.shape[:2], weight.shape[0])
    if choose("affine_flow", x, params, *options) == "reference":
        return "affine_flow has its reference alone for these arguments"
    return None


def refuse_backward(grads, outputs, *args) -> str | None:
    """Return why the ops should not compute the gradient, or None."""
    return refuse(*args)


def _normalized(h: torch.Tensor, weight: torch.Tensor, norm_weight: torch.Tensor | None) -> torch.Tensor:
    """Return the input of the projection, (B, T, C) in the dtype of `weight`."""
    if norm_weight is not None:
        _, h = run("residual_norm", None, h, None, norm_weight, None, *NORM)
    return h.to(weight.dtype)


def flow_head(x, h, weight, bias, norm_weight, *options) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.flow_head."""
    params = F.linear(_normalized(h, weight, norm_weight), weight, bias)
    return run("affine_flow", None, x, params, *options)


def flow_head_backward(grads, outputs, x, h, weight, bias, norm_weight, *options) -> list[torch.Tensor]:
    """See reference.flow_head_backward. Products take the gradients of the raw parameters in the dtype of weight."""
    y = _normalized(h, weight, norm_weight)
    params = F.linear(y, weight, bias)
    grad_x, grad_params = run("affine_flow_backward", None, grads, outputs, x, params, *options)
    grad_h = grad_params @ weight
    gradients = [grad_x, grad_h.to(h.dtype), grad_params.flatten(0, 1).T @ y.flatten(0, 1)]
    if bias is not None:
        gradients.append(grad_params.sum((0, 1)))
    if norm_weight is not None:
        given = [None, grad_h], [h.new_empty(0), y]
        gradients[1], grad_norm = run("residual_norm_backward", None, *given, h, None, norm_weight, None, *NORM)
        gradients.append(grad_norm)
    return gradients
