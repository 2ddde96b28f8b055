"""Affine flow transform from data to noise."""

from __future__ import annotations

import torch

from .._core import compiled
from .._core.checks import check_tensor
from .._core.numerics import accumulation_dtype
from .._core.registration import call, define, differentiable
from .._triton import runtime
from ..spec import AffineSpec, Logdet, check_choice
from . import native, reference

ARGUMENTS = "Tensor x, Tensor params, str scale, float soft_clip, bool shift, bool flip, str logdet"


def empty_logdet(x: torch.Tensor, logdet: str) -> torch.Tensor:
    """Return an empty log-determinant: (B, T, D) for "none", else (B,)."""
    return x.new_empty(x.shape if logdet == "none" else x.shape[:1], dtype=accumulation_dtype(x.dtype))


define(
    "affine_flow",
    ARGUMENTS,
    "(Tensor, Tensor)",
    fake=lambda x, params, scale, soft_clip, shift, flip, logdet: (x.new_empty(x.shape), empty_logdet(x, logdet)),
    reference=reference.affine_flow,
)
differentiable("affine_flow", ARGUMENTS, 2, reference.affine_flow_backward)
compiled.register("affine_flow", native)
runtime.register("affine_flow")


def affine_flow(
    x: torch.Tensor,
    params: torch.Tensor,
    spec: AffineSpec = AffineSpec(),
    *,
    shift: bool = False,
    flip: bool = False,
    logdet: Logdet = "sum",
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Transform data to noise, z_t = (x_t - mu_t) / sigma_t, with the log-determinant.

    See TarFlow (arXiv 2412.06329), eq. 3, and STARFlow (arXiv 2506.06276), section 3.

    Args:
        x: (B, T, D) tokens, any floating dtype.
        params: (B, T, 2D) raw network outputs [a | b], or (B, T, D) if spec.scale is "unit"; any floating dtype.
        spec: map from a and b to sigma and mu.
        shift: whether params[:, t] belong to token t + 1; token 0 then passes unchanged.
        flip: whether params are in the reverse of the token order of x; z keeps the order of x.
        logdet: "sum" over T and D, "mean" over T and D, or "none": one value per element, in the order of x.
        backend: name of a backend; None takes the first that can run.

    Returns:
        z (B, T, D) in the dtype of x, and log|det dz/dx| = -log sigma, (B,) or (B, T, D), float32 (float64 for
        float64 x). Both are differentiable with respect to x and params.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: an argument of the wrong shape, device or value.

    Equivalent to:
        ```python
        a, mu = params.chunk(2, dim=-1)
        z = (x - mu) * torch.exp(-a)
        logdet = -a.sum(dim=(1, 2))
        ```
    """
    check_choice("logdet", logdet, Logdet)
    check_tensor("x", x, ("B", "T", "D"))
    B, T, D = x.shape
    check_tensor("params", params, (B, T, spec.params_dim(D)), like=x)
    return call("affine_flow", x, params, spec.scale, spec.soft_clip, shift, flip, logdet, backend=backend)
