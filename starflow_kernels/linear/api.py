"""Linear layer, for the training of a flow block."""

from __future__ import annotations

import torch

from .._core import compiled
from .._core.checks import check_tensor
from .._core.dispatch import register
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
differentiable("linear", ARGUMENTS, 3, reference.linear_backward, keep_outputs=False)
register("linear", "native", native.linear, native.refuse, compiled.missing)
register("linear_backward", "native", native.linear_backward, native.refuse_backward, compiled.missing)


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, backend: str | None = None
) -> torch.Tensor:
    """y = x W^T + b.

    Args:
        x: (B, T, in) of any floating dtype.
        weight, bias: (out, in) and (out,), in the dtype of x.
        backend: name of a backend; None takes the first that can.

    Returns:
        (B, T, out) in the dtype of x. Differentiable, once, with respect to every tensor.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, device or dtype.
    """
    check_tensor("x", x, ("B", "T", "in"))
    check_tensor("weight", weight, ("out", x.shape[-1]), like=x)
    if bias is not None:
        check_tensor("bias", bias, weight.shape[:1], like=x)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != x.dtype:
            raise TypeError(f"{name}: dtype {value.dtype}, expected that of x, {x.dtype}")
    return call("linear", x, weight, bias, backend=backend)
