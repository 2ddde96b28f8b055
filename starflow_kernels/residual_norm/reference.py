"""Residual sum and the norm behind it: the specification in plain PyTorch."""

from __future__ import annotations

import torch

from ..affine_flow.reference import accumulation_dtype


def statistics(x: torch.Tensor, kind: str, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x without its mean where the norm takes it off, and 1 / its size, float32 or wider."""
    y = x.to(accumulation_dtype(x.dtype))
    if kind == "layer_norm":
        y = y - y.mean(-1, keepdim=True)
    return y, torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)


def residual_norm(
    x: torch.Tensor,
    update: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    kind: str,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + update, of no elements without an update, and the norm of the sum."""
    found = x if update is None else (x + update).to(x.dtype)
    y, size = statistics(found, kind, eps)
    y = y * size
    if weight is not None:
        y = y * (weight.to(y.dtype) if kind == "layer_norm" else 1 + weight.to(y.dtype))
    if bias is not None:
        y = y + bias.to(y.dtype)
    return x.new_empty(0) if update is None else found, y.to(x.dtype)


def residual_norm_backward(grads, outputs, x, update, weight, bias, kind, eps) -> list[torch.Tensor]:
    """Gradients with respect to x, that with respect to the update too, weight and bias; the norm is computed anew."""
    found = x if outputs[0].shape != x.shape else outputs[0]
    y, size = statistics(found, kind, eps)
    y, grad = y * size, grads[1].to(y.dtype)
    to_y = grad
    if weight is not None:
        to_y = grad * (weight.to(y.dtype) if kind == "layer_norm" else 1 + weight.to(y.dtype))
    grad_x = to_y - y * (to_y * y).mean(-1, keepdim=True)
    if kind == "layer_norm":
        grad_x = grad_x - to_y.mean(-1, keepdim=True)
    grad_x = grad_x * size
    if found is not x:
        grad_x = grad_x + grads[0].to(y.dtype)
    parts = [(grad_x, x), ((grad * y).sum((0, 1)), weight), (grad.sum((0, 1)), bias)]
    return [value.to(like.dtype) for value, like in parts if like is not None]
