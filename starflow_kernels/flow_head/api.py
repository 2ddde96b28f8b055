"""Flow head: from the hidden states of the causal transformer to noise and log-determinant."""

from __future__ import annotations

import torch

from .._core import compiled
from .._core.checks import check_tensor
from .._core.dispatch import prefer, register
from .._core.registration import call, define, differentiable
from .._triton import runtime
from ..affine_flow.api import empty_logdet
from ..spec import AffineSpec, Logdet, check_choice
from . import composed, native, reference, traffic

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
register("flow_head", "composed", composed.flow_head, composed.refuse)
register("flow_head_backward", "composed", composed.flow_head_backward, composed.refuse_backward)
compiled.register("flow_head", native)
runtime.register("flow_head")
prefer("flow_head", traffic.preferred, traffic.here)
prefer("flow_head_backward", traffic.preferred_backward, traffic.here)


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
    """Project hidden states to raw parameters and apply `affine_flow`, without storing the parameters.

    This is the output layer of a block in TarFlow (arXiv 2412.06329), eq. 3, and STARFlow (arXiv 2506.06276),
    section 3.

    Args:
        x: (B, T, D) tokens, any floating dtype.
        h: (B, T, C) hidden states in the network's token order, any floating dtype.
        weight: (P, C), the projection to P = 2D raw outputs [a | b], or to P = D if spec.scale is "unit".
        bias: (P,) in the dtype of weight, or None.
        norm_weight: (C,) weight w of a final RMSNorm, h rsqrt(mean h^2 + 1e-6) (1 + w); None for no norm.
        spec: map from a and b to sigma and mu, as in `affine_flow`.
        shift: as in `affine_flow`.
        flip: as in `affine_flow`.
        logdet: as in `affine_flow`.
        backend: name of a backend; None takes the one predicted to be the fastest on a GPU, else the first that can
            run.

    Returns:
        z (B, T, D) in the dtype of x, and the log-determinant, (B,) or (B, T, D), float32 (float64 for float64 x).
        Differentiable with respect to every tensor.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: an argument of the wrong shape, device or value.

    Equivalent to:
        ```python
        y = torch.nn.functional.rms_norm(h, h.shape[-1:], 1 + norm_weight, eps=1e-6)
        params = torch.nn.functional.linear(y, weight, bias)
        z, logdet = affine_flow(x, params, spec)
        ```
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
