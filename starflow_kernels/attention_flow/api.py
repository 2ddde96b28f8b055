"""Attention flow: a flow of one attention layer, from queries, keys and values to noise and log-determinant."""

from __future__ import annotations

import torch

from .._core.checks import check_tensor
from .._core.dispatch import register
from .._core.registration import call, define, differentiable
from .._triton import runtime
from ..affine_flow.api import empty_logdet
from ..affine_flow.reference import accumulation_dtype
from ..causal_attention.api import check_attention
from ..spec import AffineSpec, Logdet, Rotary, check_choice
from . import composed, reference

ARGUMENTS = (
    "Tensor x, Tensor q, Tensor k, Tensor v, Tensor weight, Tensor? bias, Tensor? cos, Tensor? sin, str rotary, "
    "int window, float temperature, str scale, float soft_clip, bool shift, bool flip, str logdet"
)


def _fake(x, q, *args):
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
    """`causal_attention`, projection of its heads to raw parameters, `affine_flow`; keeps neither of the first two.

    Args:
        x: (B, T, D) tokens.
        q, k, v: (B, T, H, d), (B, T, H_kv, d) twice, as in `causal_attention`, in the network's token order.
        weight, bias: (P, H d) and (P,), the projection to P = 2D raw outputs [a | b], P = D for spec.scale "unit";
            in the dtype of q.
        cos, sin, rotary, window, temperature: as in `causal_attention`.
        spec, shift, flip, logdet, backend: as in `affine_flow`.

    Returns:
        z (B, T, D) in the dtype of x, and the log-determinant, (B,) or (B, T, D), float32 (float64 for float64 x).
        Differentiable, once, with respect to x, q, k, v, weight and bias.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, device or value.
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
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != q.dtype:
            raise TypeError(f"{name}: dtype {value.dtype}, expected that of q, {q.dtype}")
    options = rotary, window or 0, temperature, spec.scale, spec.soft_clip, shift, flip, logdet
    z, found, _ = call("attention_flow", x, q, k, v, weight, bias, cos, sin, *options, backend=backend)
    return z, found
