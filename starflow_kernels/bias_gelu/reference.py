"""Exact GELU behind a bias: the specification in plain PyTorch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..affine_flow.reference import accumulation_dtype


def _sum(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y = x.to(accumulation_dtype(x.dtype))
    return y if bias is None else y + bias.to(y.dtype)


def bias_gelu(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """y Phi(y) of y = x + bias, Phi the normal distribution function."""
    return F.gelu(_sum(x, bias)).to(x.dtype)


def bias_gelu_backward(grads, outputs, x, bias) -> list[torch.Tensor]:
    """Gradients with respect to x and bias: Phi(y) + y phi(y) times that of the output."""
    y = _sum(x, bias)
    density = torch.exp(-0.5 * y.square()) / math.sqrt(2 * math.pi)
    grad = grads[0].to(y.dtype) * (0.5 * (1 + torch.erf(y * math.sqrt(0.5))) + y * density)
    found = [grad.to(x.dtype)]
    return found if bias is None else [*found, grad.sum((0, 1)).to(bias.dtype)]
