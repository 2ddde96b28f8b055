"""Exact GELU behind a bias, the activation of a transformer's perceptron."""

from __future__ import annotations

import torch

from .._core.checks import check_tensor
from .._core.registration import call, define, differentiable
from .._triton import runtime
from . import reference

ARGUMENTS = "Tensor x, Tensor? bias"

define("bias_gelu", ARGUMENTS, "Tensor", fake=lambda x, bias: x.new_empty(x.shape), reference=reference.bias_gelu)
differentiable("bias_gelu", ARGUMENTS, 2, reference.bias_gelu_backward, keep_outputs=False)
runtime.register("bias_gelu")


def bias_gelu(x: torch.Tensor, bias: torch.Tensor | None = None, *, backend: str | None = None) -> torch.Tensor:
    """y Phi(y) of y = x + bias, Phi the normal distribution function; float32 inside, computed anew for the gradient.

    Args:
        x: (B, T, C), any floating dtype.
        bias: (C,) of any floating dtype, or None.
        backend: name of a backend; None takes the first that can.

    Returns:
        (B, T, C) in the dtype of x. Differentiable, once, with respect to x and bias.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or device.
    """
    check_tensor("x", x, ("B", "T", "C"))
    if bias is not None:
        check_tensor("bias", bias, (x.shape[2],), like=x)
    return call("bias_gelu", x, bias, backend=backend)
