"""Causal attention over a whole sequence, used from data to noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .._core import compiled
from .._core.checks import check_range, check_tensor
from .._core.dispatch import prefer, register
from .._core.numerics import accumulation_dtype
from .._core.registration import call, define, differentiable
from .._triton import runtime
from ..spec import Rotary, check_choice
from . import cudnn, flash, native, reference, sdpa, timings

ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, str rotary, int window, float temperature"


def _fake(q: torch.Tensor, *others: object) -> tuple[torch.Tensor, torch.Tensor]:
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, T), dtype=accumulation_dtype(q.dtype))


define("causal_attention", ARGUMENTS, "(Tensor, Tensor)", fake=_fake, reference=reference.causal_attention)
differentiable("causal_attention", ARGUMENTS, 3, reference.causal_attention_backward)
register("causal_attention", "cudnn", cudnn.causal_attention, cudnn.refuse, cudnn.unavailable)
register(
    "causal_attention_backward", "cudnn", cudnn.causal_attention_backward, cudnn.refuse_backward, cudnn.unavailable
)
register("causal_attention", "sdpa", sdpa.causal_attention, sdpa.refuse)
register("causal_attention_backward", "sdpa", sdpa.causal_attention_backward, sdpa.refuse_backward)
register("causal_attention", "flash", flash.causal_attention, flash.refuse, flash.unavailable)
register(
    "causal_attention_backward", "flash", flash.causal_attention_backward, flash.refuse_backward, flash.unavailable
)
compiled.register("causal_attention", native)
runtime.register("causal_attention")
TABLE = timings.Table(Path(__file__).with_name("timings.json"))


def _measured(q: torch.Tensor, *others: Any) -> str | None:
    return TABLE.name("forward", q, 0 < others[-2] < q.shape[1])


def _measured_backward(grads: list, outputs: list, q: torch.Tensor, *others: Any) -> str | None:
    return TABLE.name("backward", q, 0 < others[-2] < q.shape[1])


prefer("causal_attention", _measured, lambda: TABLE.here("forward"))
prefer("causal_attention_backward", _measured_backward, lambda: TABLE.here("backward"))


def check_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    rotary: str,
    window: int | None,
    temperature: float,
    cache: int = 0,
) -> None:
    """Check the arguments that `causal_attention` and `cached_attention` share; cache: its slots, 0 for no cache."""
    check_choice("rotary", rotary, Rotary)
    check_tensor("q", q, ("B", "T", "H", "d"))
    B, T, H, d = q.shape
    angles = cache or T
    check_tensor("k", k, (B, T, "H_kv", d), like=q)
    check_tensor("v", v, tuple(k.shape), like=q)
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k, v: dtypes {q.dtype}, {k.dtype}, {v.dtype} differ")
    if H % k.shape[2]:
        raise ValueError(f"k: {k.shape[2]} heads do not divide the {H} heads of q")
    if (rotary == "none") != (cos is None) or (cos is None) != (sin is None):
        raise ValueError(
            f"cos, sin: both are needed with rotary={rotary!r}"
            if rotary != "none"
            else "cos, sin: given, but rotary='none' does not use them"
        )
    if cos is not None and sin is not None:
        if d % 2:
            raise ValueError(f"q: rotary positions need an even head size, got {d}")
        check_tensor("cos", cos, (angles, d // 2), like=q)
        check_tensor("sin", sin, (angles, d // 2), like=q)
        if cos.requires_grad or sin.requires_grad:
            raise ValueError("cos, sin: the rotary angles carry no gradient")
    if window is not None and window < 1:
        raise ValueError(f"window={window}: expected at least 1, or None for all of the past")
    check_range("temperature", temperature, 0)


def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    rotary: Rotary = "none",
    window: int | None = None,
    temperature: float = 1.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend causally: softmax(q k^T / (temperature sqrt(d)) + causal mask) v, with queries and keys rotated first.

    This is the attention of TarFlow (arXiv 2412.06329) and STARFlow (arXiv 2506.06276), with rotary positions from
    arXiv 2104.09864.

    Args:
        q: (B, T, H, d), any floating dtype.
        k: (B, T, H_kv, d) in the dtype of q; H_kv divides H, and query head h reads head h // (H / H_kv).
        v: (B, T, H_kv, d) in the dtype of q.
        cos: (T, d / 2) cosines of the rotary angles, float32 or wider.
        sin: (T, d / 2) sines, as cos.
        rotary: pairs to rotate. "none"; "interleaved": (x_0, x_1), (x_2, x_3), ...; "half": (x_i, x_{i + d/2}).
        window: number of tokens that a token sees: t - window + 1 .. t. None: all of 0 .. t.
        temperature: attention temperature, which divides the scores.
        return_lse: whether to return the log-sum-exp of the scores too.
        backend: name of a backend; None takes the one measured fastest on this machine, else the first that can run.

    Returns:
        (B, T, H, d) in the dtype of q; with return_lse also (B, H, T) in float32 (float64 for float64 q).
        Differentiable with respect to q, k and v.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: an argument of the wrong shape, device or value.

    Equivalent to:
        ```python
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out = out.transpose(1, 2)
        ```
    """
    check_attention(q, k, v, cos, sin, rotary, window, temperature)
    out, lse = call("causal_attention", q, k, v, cos, sin, rotary, window or 0, temperature, backend=backend)
    return (out, lse) if return_lse else out
