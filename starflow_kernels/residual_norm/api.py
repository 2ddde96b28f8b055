"""Residual sum and the norm behind it, between the layers of a transformer."""

from __future__ import annotations

from typing import Literal

import torch

from .._core.checks import check_range, check_tensor
from .._core.registration import call, define, differentiable
from .._triton import runtime
from ..spec import check_choice
from . import reference

ARGUMENTS = "Tensor x, Tensor? update, Tensor? weight, Tensor? bias, str kind, float eps"
Kind = Literal["layer_norm", "rms_norm"]
EPS = {"layer_norm": 1e-5, "rms_norm": 1e-6}


def _fake(x, update, *others):
    return x.new_empty(0) if update is None else x.new_empty(x.shape), x.new_empty(x.shape)


define("residual_norm", ARGUMENTS, "(Tensor, Tensor)", fake=_fake, reference=reference.residual_norm)
differentiable("residual_norm", ARGUMENTS, 4, reference.residual_norm_backward, shared={1: 0})
runtime.register("residual_norm")


def residual_norm(
    x: torch.Tensor,
    update: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    kind: Kind = "layer_norm",
    eps: float | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + update and the norm of the sum over the last dimension, float32 inside: each tensor is read or written once.

    Args:
        x: (B, T, C), any floating dtype.
        update: (B, T, C) of any floating dtype, what a layer adds to x; None: the sum is x itself.
        weight, bias: (C,). The normalised sum is multiplied by weight, "layer_norm", or by 1 + weight, "rms_norm".
        kind: "layer_norm" or "rms_norm".
        eps: added to the mean square; None: 1e-5 for "layer_norm", 1e-6 for "rms_norm".
        backend: name of a backend; None takes the first that can.

    Returns:
        The sum and its norm, (B, T, C) in the dtype of x. Differentiable, once, with respect to every tensor.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, device or value.
    """
    check_choice("kind", kind, Kind)
    check_tensor("x", x, ("B", "T", "C"))
    for name, value, shape in (
        ("update", update, x.shape),
        ("weight", weight, x.shape[2:]),
        ("bias", bias, x.shape[2:]),
    ):
        if value is not None:
            check_tensor(name, value, tuple(shape), like=x)
    eps = EPS[kind] if eps is None else eps
    check_range("eps", eps, 0)
    total, normed = call("residual_norm", x, update, weight, bias, kind, eps, backend=backend)
    return x if update is None else total, normed
