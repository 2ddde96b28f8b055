"""Linear layer: the specification in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x W^T + b."""
    return F.linear(x, weight, bias)


def linear_backward(grads, outputs, x, weight, bias) -> list[torch.Tensor]:
    """Return the gradients with respect to x, weight and, if it is given, bias."""
    (grad,) = grads
    gradients = [grad @ weight, grad.flatten(0, 1).T @ x.flatten(0, 1)]
    return gradients if bias is None else [*gradients, grad.sum((0, 1))]
