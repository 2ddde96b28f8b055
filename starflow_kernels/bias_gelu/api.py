"""Bias and exact GELU, the activation of a transformer's MLP."""

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
    """Add a bias and apply the exact GELU: y Phi(y) with y = x + bias and the normal distribution function Phi.

    GELU (arXiv 1606.08415) is the activation in the MLP of TarFlow (arXiv 2412.06329). It is computed in float32 or
    wider. The gradient recomputes y, so that y is never stored.

    Args:
        x: (B, T, C), any floating dtype.
        bias: (C,), any floating dtype, or None.
        backend: name of a backend; None takes the first that can run.

    Returns:
        (B, T, C) in the dtype of x. Differentiable with respect to x and bias.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: an argument of the wrong shape or device.

    Equivalent to:
        ```python
        out = torch.nn.functional.gelu(x + bias)
        ```
    """
    check_tensor("x", x, ("B", "T", "C"))
    if bias is not None:
        check_tensor("bias", bias, (x.shape[2],), like=x)
    return call("bias_gelu", x, bias, backend=backend)
