"""Flow with one attention layer, from queries, keys and values to noise and log-determinant."""

from __future__ import annotations

from typing import Any

import torch

from .._core.checks import check_same_dtype, check_tensor
from .._core.dispatch import register
from .._core.numerics import accumulation_dtype
from .._core.registration import call, define, differentiable
from .._triton import runtime
from ..affine_flow.api import empty_logdet
from ..causal_attention.api import check_attention
from ..spec import AffineSpec, Logdet, Rotary, check_choice
from . import composed, reference

ARGUMENTS = (
    "Tensor x, Tensor q, Tensor k, Tensor v, Tensor weight, Tensor? bias, Tensor? cos, Tensor? sin, str rotary, "
    "int window, float temperature, str scale, float soft_clip, bool shift, bool flip, str logdet"
)


def _fake(x: torch.Tensor, q: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    B, T, H, _ = q.shape
    lse = q.new_empty((B, H, T), dtype=accumulation_dtype(q.dtype))
    return x.new_empty(x.shape), empty_logdet(x, args[-1]), lse


define("attention_flow", ARGUMENTS, "(Tensor, Tensor, Tensor)", fake=_fake, reference=reference.attention_flow)
differentiable("attention_flow", ARGUMENTS, 6, reference.attention_flow_backward)
register("attention_flow", "composed", composed.attention_flow, composed.refuse)
register("attention_flow_backward", "composed", composed.attention_flow_backward, composed.refuse_backward)
runtime.register("attention_flow")


def attention_flow(
    x: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    spec: AffineSpec = AffineSpec(),
    *,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    rotary: Rotary = "none",
    window: int | None = None,
    temperature: float = 1.0,
    shift: bool = False,
    flip: bool = False,
    logdet: Logdet = "sum",
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply `causal_attention`, project its heads to raw parameters, and apply `affine_flow`, in one op.

    This is TarFlow (arXiv 2412.06329), eq. 3, with one attention layer as the network.

    Args:
        x: (B, T, D) tokens, any floating dtype.
        q: (B, T, H, d) queries in the network's token order, any floating dtype.
        k: (B, T, H_kv, d) keys in the dtype of q, as in `causal_attention`.
        v: (B, T, H_kv, d) values in the dtype of q, as in `causal_attention`.
        weight: (P, H d) in the dtype of q, the projection to P = 2D raw outputs [a | b], or to P = D if spec.scale is
            "unit".
        bias: (P,) in the dtype of q, or None.
        spec: map from a and b to sigma and mu, as in `affine_flow`.
        cos: as in `causal_attention`.
        sin: as in `causal_attention`.
        rotary: as in `causal_attention`.
        window: as in `causal_attention`.
        temperature: as in `causal_attention`.
        shift: as in `affine_flow`.
        flip: as in `affine_flow`.
        logdet: as in `affine_flow`.
        backend: name of a backend; None takes the first that can run.

    Returns:
        z (B, T, D) in the dtype of x, and the log-determinant, (B,) or (B, T, D), float32 (float64 for float64 x).
        Differentiable with respect to x, q, k, v, weight and bias.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: an argument of the wrong shape, device or value.

    Equivalent to:
        ```python
        heads = causal_attention(q, k, v, cos=cos, sin=sin, rotary=rotary)
        params = torch.nn.functional.linear(heads.flatten(2), weight, bias)
        z, logdet = affine_flow(x, params, spec)
        ```
    """
    check_choice("logdet", logdet, Logdet)
    check_tensor("x", x, ("B", "T", "D"))
    B, T, D = x.shape
    check_tensor("q", q, (B, T, "H", "d"), like=x)
    check_attention(q, k, v, cos, sin, rotary, window, temperature)
    params_dim = spec.params_dim(D)
    check_tensor("weight", weight, (params_dim, q.shape[2] * q.shape[3]), like=x)
    if bias is not None:
        check_tensor("bias", bias, (params_dim,), like=x)
    check_same_dtype("q", {"q": q, "weight": weight, "bias": bias})
    options = rotary, window or 0, temperature, spec.scale, spec.soft_clip, shift, flip, logdet
    return call("attention_flow", x, q, k, v, weight, bias, cos, sin, *options, backend=backend)[:2]
