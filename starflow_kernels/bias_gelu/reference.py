"""Bias and exact GELU: the specification in plain PyTorch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .._core.numerics import accumulation_dtype


def _sum(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y = x.to(accumulation_dtype(x.dtype))
    return y if bias is None else y + bias.to(y.dtype)


def bias_gelu(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return y Phi(y) for y = x + bias, where Phi is the normal distribution function."""
    return F.gelu(_sum(x, bias)).to(x.dtype)


def bias_gelu_backward(grads, outputs, x, bias) -> list[torch.Tensor]:
    """Return the gradients with respect to x and bias; the derivative of y Phi(y) is Phi(y) + y phi(y)."""
    y = _sum(x, bias)
    density = torch.exp(-0.5 * y.square()) / math.sqrt(2 * math.pi)
    grad = grads[0].to(y.dtype) * (0.5 * (1 + torch.erf(y * math.sqrt(0.5))) + y * density)
    grad_x = grad.to(x.dtype)
    return [grad_x] if bias is None else [grad_x, grad.sum((0, 1)).to(bias.dtype)]
