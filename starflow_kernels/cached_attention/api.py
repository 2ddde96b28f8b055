"""Attention of new tokens over a KV cache, sampling direction."""

from __future__ import annotations

import torch

from .._core import compiled
from .._core.checks import check_tensor
from .._core.dispatch import register
from .._core.registration import define
from ..causal_attention.api import check_attention
from ..spec import Rotary
from . import native, reference

define(
    "cached_attention",
    "Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor lengths, "
    "Tensor? cos, Tensor? sin, str rotary, int window, float temperature",
    "Tensor",
    fake=lambda q, *args: q.new_empty(q.shape),
    reference=reference.cached_attention,
)
register("cached_attention", "native", native.cached_attention, native.refuse, compiled.missing)


def cached_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: int | torch.Tensor,
    *,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    rotary: Rotary = "none",
    window: int | None = None,
    temperature: float = 1.0,
    backend: str | None = None,
) -> torch.Tensor:
    """Append n new tokens to a KV cache and attend from them over the prefix and, causally, over themselves.

    Args:
        q: (B, n, H, d) queries of the new tokens, n >= 1.
        k, v: (B, n, H_kv, d) their keys and values, in the dtype of q.
        k_cache, v_cache: (B, S, H_kv, d) in the dtype of q; positions lengths .. lengths + n - 1 are written, keys
            rotated. What stands behind is not read.
        lengths: tokens already in the cache, one int, or an int32 tensor (B,) for a length a row.
        cos, sin: (S, d / 2) of the rotary angles by cache position.
        rotary, window, temperature, backend: as in `causal_attention`.

    Returns:
        (B, n, H, d) in the dtype of q. Not differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, device or value, or a cache too short for the
            new tokens (checked where `lengths` is an int or on the CPU).
    """
    check_tensor("k_cache", k_cache, ("B", "S", "H_kv", "d"))
    S = k_cache.shape[1]
    check_attention(q, k, v, cos, sin, rotary, window, temperature, cache=S)
    B, n = q.shape[:2]
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_tensor(name, cache, (B, S, *k.shape[2:]), like=q)
        if cache.dtype != q.dtype:
            raise TypeError(f"{name}: dtype {cache.dtype}, expected that of q, {q.dtype}")
    if isinstance(lengths, int):
        shortest = longest = lengths
        lengths = torch.full((B,), lengths, dtype=torch.int32, device=q.device)
    else:
        if not isinstance(lengths, torch.Tensor):
            raise TypeError(f"lengths: expected an int or an int32 tensor ({B},), got {type(lengths).__name__}")
        if lengths.dtype != torch.int32 or lengths.shape != (B,):
            raise ValueError(f"lengths: expected int32 ({B},), got {lengths.dtype} {tuple(lengths.shape)}")
        readable = lengths.device.type == "cpu" and not torch.compiler.is_compiling()
        shortest, longest = (int(m) for m in lengths.aminmax()) if readable and B else (0, 0)
    if shortest < 0 or longest + n > S:
        raise ValueError(f"lengths: {shortest} .. {longest} cached and {n} new tokens do not fit a cache of {S}")
    with torch.no_grad():
        return torch.ops.starflow.cached_attention(
            q, k, v, k_cache, v_cache, lengths, cos, sin, rotary, window or 0, temperature, backend=backend
        )
