"""Linear layer for training a flow block."""

from __future__ import annotations

import torch

from .._core import compiled
from .._core.checks import check_same_dtype, check_tensor
from .._core.registration import call, define, differentiable
from . import native, reference

ARGUMENTS = "Tensor x, Tensor weight, Tensor? bias"

define(
    "linear",
    ARGUMENTS,
    "Tensor",
    fake=lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])),
    reference=reference.linear,
)
differentiable(
    "linear",
    ARGUMENTS,
    3,
    reference.linear_backward,
    keep_outputs=False,
    of_first=lambda grad, weight, bias, backend: call("linear", grad, weight.T, None, backend=backend),
)
compiled.register("linear", native)


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, backend: str | None = None
) -> torch.Tensor:
    """Apply a linear layer, y = x W^T + b.

    These are the matrix products of the transformer in TarFlow (arXiv 2412.06329), for training steps on a CPU.

    Args:
        x: (B, T, in), any floating dtype.
        weight: (out, in) in the dtype of x.
        bias: (out,) in the dtype of x, or None.
        backend: name of a backend; None takes the first that can run.

    Returns:
        (B, T, out) in the dtype of x. Differentiable with respect to every tensor.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: an argument of the wrong shape or device.

    Equivalent to:
        ```python
        y = torch.nn.functional.linear(x, weight, bias)
        ```
    """
    check_tensor("x", x, ("B", "T", "in"))
    check_tensor("weight", weight, ("out", x.shape[-1]), like=x)
    if bias is not None:
        check_tensor("bias", bias, weight.shape[:1], like=x)
    check_same_dtype("x", {"x": x, "weight": weight, "bias": bias})
    return call("linear", x, weight, bias, backend=backend)
