"""Residual sum and its norm, between the layers of a transformer."""

from __future__ import annotations

import torch

from .._core.checks import check_range, check_tensor
from .._core.numerics import NORM_EPS
from .._core.registration import call, define, differentiable
from .._triton import runtime
from ..spec import NormKind, check_choice
from . import reference

ARGUMENTS = "Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, str kind, float eps"


def _fake(x: torch.Tensor, residual: torch.Tensor | None, *others: object) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(0) if residual is None else x.new_empty(x.shape), x.new_empty(x.shape)


define("residual_norm", ARGUMENTS, "(Tensor, Tensor)", fake=_fake, reference=reference.residual_norm)
differentiable("residual_norm", ARGUMENTS, 4, reference.residual_norm_backward, shared={1: 0})
runtime.register("residual_norm")


def residual_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    kind: NormKind = "layer_norm",
    eps: float | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add `residual` to x and normalize the sum over the last dimension, reading and writing each tensor once.

    These are the norms of TarFlow (arXiv 2412.06329) and STARFlow (arXiv 2506.06276). Sums are accumulated in float32
    or wider.

    Args:
        x: (B, T, C), any floating dtype.
        residual: (B, T, C), any floating dtype, added to x; None: the sum is x itself.
        weight: (C,), any floating dtype. Multiplies the normalized sum: by weight for "layer_norm", by 1 + weight for
            "rms_norm".
        bias: (C,), any floating dtype, added to the normalized sum.
        kind: "layer_norm" or "rms_norm".
        eps: added to the mean square; None: 1e-5 for "layer_norm", 1e-6 for "rms_norm".
        backend: name of a backend; None takes the first that can run.

    Returns:
        The sum and its norm, (B, T, C) in the dtype of x. Differentiable with respect to every tensor.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: an argument of the wrong shape, device or value.

    Equivalent to:
        ```python
        total = x + residual
        normed = torch.nn.functional.layer_norm(total, total.shape[-1:], weight, bias)  # or:
        normed = torch.nn.functional.rms_norm(total, total.shape[-1:], 1 + weight, eps=1e-6)
        ```
    """
    check_choice("kind", kind, NormKind)
    check_tensor("x", x, ("B", "T", "C"))
    for name, value, shape in (
        ("residual", residual, x.shape),
        ("weight", weight, x.shape[2:]),
        ("bias", bias, x.shape[2:]),
    ):
        if value is not None:
            check_tensor(name, value, tuple(shape), like=x)
    eps = NORM_EPS[kind] if eps is None else eps
    check_range("eps", eps, 0)
    total, normed = call("residual_norm", x, residual, weight, bias, kind, eps, backend=backend)
    return x if residual is None else total, normed
