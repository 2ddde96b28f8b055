"""Flow head: from the hidden states of the causal network to noise and log-determinant."""

from __future__ import annotations

import torch

from .._core import compiled
from .._core.checks import check_tensor
from .._core.dispatch import register
from .._core.registration import call, define, differentiable
from .._triton import runtime
from ..affine_flow.api import empty_logdet
from ..spec import AffineSpec, Logdet, check_choice
from . import native, reference

ARGUMENTS = (
    "Tensor x, Tensor h, Tensor weight, Tensor? bias, Tensor? norm_weight, "
    "str scale, float soft_clip, bool shift, bool flip, str logdet"
)

define(
    "flow_head",
    ARGUMENTS,
    "(Tensor, Tensor)",
    fake=lambda x, *args: (x.new_empty(x.shape), empty_logdet(x, args[-1])),
    reference=reference.flow_head,
)
differentiable("flow_head", ARGUMENTS, 5, reference.flow_head_backward)
register("flow_head", "native", native.flow_head, native.refuse, compiled.missing)
register("flow_head_backward", "native", native.flow_head_backward, native.refuse_backward, compiled.missing)
runtime.register("flow_head")


def flow_head(
    x: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    spec: AffineSpec = AffineSpec(),
    *,
    shift: bool = False,
    flip: bool = False,
    logdet: Logdet = "sum",
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Project hidden states to raw parameters and apply `affine_flow`, without keeping the parameters.

    Args:
        x: (B, T, D) tokens.
        h: (B, T, C) hidden states in the network's token order.
        weight, bias: (P, C) and (P,), the projection to P = 2D raw outputs [a | b], P = D for spec.scale "unit".
        norm_weight: (C,) weight w of a final RMSNorm, h rsqrt(mean h^2 + 1e-6) (1 + w); None for no norm.
        spec, shift, flip, logdet, backend: as in `affine_flow`.

    Returns:
        z (B, T, D) in the dtype of x, and the log-determinant, (B,) or (B, T, D), float32 (float64 for float64 x).
        Differentiable, once, with respect to every tensor.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, device or value.
    """
    check_choice("logdet", logdet, Logdet)
    check_tensor("x", x, ("B", "T", "D"))
    B, T, D = x.shape
    check_tensor("h", h, (B, T, "C"), like=x)
    params_dim, C = spec.params_dim(D), h.shape[-1]
    check_tensor("weight", weight, (params_dim, C), like=x)
    if bias is not None:
        check_tensor("bias", bias, (params_dim,), like=x)
    if norm_weight is not None:
        check_tensor("norm_weight", norm_weight, (C,), like=x)
    options = spec.scale, spec.soft_clip, shift, flip, logdet
    return call("flow_head", x, h, weight, bias, norm_weight, *options, backend=backend)
