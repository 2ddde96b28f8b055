"""Linear layer by the oneDNN that torch brings along, which has AVX-512 products on every CPU; its BLAS may not."""

from __future__ import annotations

import torch


def missing() -> str | None:
    """Why this torch cannot, or None."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this build of torch has no oneDNN"
    return None


def refuse(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    """Why these arguments cannot run here, or None."""
    if x.device.type != "cpu":
        return f"it runs on the CPU, x is on {x.device}"
    if x.dtype != torch.float32:
        return f"x is {x.dtype}, it takes float32"
    return None if x.numel() else "there are no tokens"


def refuse_backward(grads, outputs, *args) -> str | None:
    """The same for the gradient."""
    return refuse(*args)


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """See reference.linear."""
    return _product(x, weight, bias)


def linear_backward(grads, outputs, x, weight, bias) -> list[torch.Tensor]:
    """See reference.linear_backward."""
    (grad,) = grads
    found = [_product(grad, weight.T), _product(grad.flatten(0, 1).T, x.flatten(0, 1).T)]
    return found if bias is None else [*found, grad.sum((0, 1))]
