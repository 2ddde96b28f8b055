"""Residual sum and norm: the specification in plain PyTorch."""

from __future__ import annotations

import torch

from .._core.numerics import norm_statistics


def residual_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    kind: str,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x + residual and its norm. If residual is None, the first result has no elements."""
    total = x if residual is None else (x + residual).to(x.dtype)
    y, inverse = norm_statistics(total, kind, eps)
    y = y * inverse
    if weight is not None:
        y = y * (weight.to(y.dtype) if kind == "layer_norm" else 1 + weight.to(y.dtype))
    if bias is not None:
        y = y + bias.to(y.dtype)
    return x.new_empty(0) if residual is None else total, y.to(x.dtype)


def used_norm(total: torch.Tensor, grad: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum and the gradient of its norm. Both are zero if the norm was not used: 0 * infinity is NaN."""
    return (total, grad) if grad is not None else (torch.zeros_like(total), torch.zeros_like(total))


def residual_norm_backward(grads, outputs, x, residual, weight, bias, kind, eps) -> list[torch.Tensor]:
    """Return the gradients with respect to x (the same as for residual), weight and bias; recomputes the norm."""
    total, grad_total = (x, None) if outputs[0].shape != x.shape else (outputs[0], grads[0])
    total, grad_normed = used_norm(total, grads[1])
    y, inverse = norm_statistics(total, kind, eps)
    y, grad = y * inverse, grad_normed.to(y.dtype)
    grad_y = grad
    if weight is not None:
        grad_y = grad * (weight.to(y.dtype) if kind == "layer_norm" else 1 + weight.to(y.dtype))
    grad_x = grad_y - y * (grad_y * y).mean(-1, keepdim=True)
    if kind == "layer_norm":
        grad_x = grad_x - grad_y.mean(-1, keepdim=True)
    grad_x = grad_x * inverse
    if grad_total is not None:
        grad_x = grad_x + grad_total.to(y.dtype)
    gradients = [(grad_x, x), ((grad * y).sum((0, 1)), weight), (grad.sum((0, 1)), bias)]
    return [value.to(like.dtype) for value, like in gradients if like is not None]
