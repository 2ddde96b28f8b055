"""Linear layer by the oneDNN that torch brings along, which has AVX-512 products on every CPU; its BLAS may not."""

from __future__ import annotations

import math

import torch

LONGEST = 384  # inputs that one sum runs over: the error of a sum in one chain grows with its length


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


def _dense(weight: torch.Tensor) -> torch.Tensor:
    # With other strides oneDNN takes a thousand times as long.
    return weight if weight.is_contiguous() or weight.T.is_contiguous() else weight.contiguous()


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    inputs = weight.shape[1]
    pieces = max(1, math.ceil(inputs / LONGEST))
    size = max(1, math.ceil(inputs / pieces))
    xs, weights = x.split(size, -1), [_dense(piece) for piece in weight.split(size, -1)]
    bias = None if bias is None else bias.contiguous()
    y = torch.ops.mkldnn._linear_pointwise(xs[0], weights[0], bias, "none", [], "")
    for x, weight in zip(xs[1:], weights[1:]):
        y = torch.ops.mkldnn._linear_pointwise.binary(x, y, weight, None, "add")
    return y


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """See reference.linear."""
    return _product(x, weight, bias)


def linear_backward(grads, outputs, x, weight, bias) -> list[torch.Tensor]:
    """See reference.linear_backward."""
    (grad,) = grads
    of_outputs, of_inputs = grad.flatten(0, 1).T, x.flatten(0, 1).T
    # The wider one in the place of the weights is the faster way round, with the same bits.
    wide = weight.shape[0] > weight.shape[1]
    grad_weight = _product(of_inputs, of_outputs).T if wide else _product(of_outputs, of_inputs)
    found = [_product(grad, weight.T), grad_weight]
    return found if bias is None else [*found, grad.sum((0, 1))]
