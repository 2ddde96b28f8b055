"""Attention of new tokens over a KV cache, used from noise to data."""

from __future__ import annotations

import torch

from .._core import compiled
from .._core.checks import check_same_dtype, check_tensor
from .._core.registration import call, define, refuse_transforms
from .._core.torch_private import is_intercepted
from ..causal_attention.api import check_attention
from ..spec import Rotary
from . import native, reference

INSTEAD = "use causal_attention on all tokens"

define(
    "cached_attention",
    "Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor lengths, "
    "Tensor? cos, Tensor? sin, str rotary, int window, float temperature",
    "Tensor",
    fake=lambda q, *args: q.new_empty(q.shape),
    reference=reference.cached_attention,
    instead=INSTEAD,
)
compiled.register("cached_attention", native, backward=False)


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
    """Append n new tokens to a KV cache, and attend from them to all earlier tokens and, causally, to themselves.

    This is one sampling step of the attention in TarFlow (arXiv 2412.06329) and STARFlow (arXiv 2506.06276).

    Args:
        q: (B, n, H, d) queries of the new tokens, n >= 1, any floating dtype.
        k: (B, n, H_kv, d) keys of the new tokens in the dtype of q.
        v: (B, n, H_kv, d) values of the new tokens in the dtype of q.
        k_cache: (B, S, H_kv, d) in the dtype of q. Rotated keys are written to slots lengths .. lengths + n - 1; later
            slots are not read.
        v_cache: (B, S, H_kv, d), as k_cache.
        lengths: number of tokens already in the cache: one int, or an int32 tensor (B,) with a length per row.
        cos: (S, d / 2) cosines of the rotary angles per cache slot, float32 or wider.
        sin: (S, d / 2) sines, as cos.
        rotary: as in `causal_attention`.
        window: as in `causal_attention`.
        temperature: as in `causal_attention`.
        backend: name of a backend; None takes the first that can run.

    Returns:
        (B, n, H, d) in the dtype of q. Not differentiable.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: an argument of the wrong shape, device or value, or a cache too short for the new tokens (checked
            where `lengths` is an int or on the CPU).

    Equivalent to:
        ```python
        k_cache[:, length : length + n], v_cache[:, length : length + n] = k, v
        keys, values = k_cache[:, : length + n], v_cache[:, : length + n]
        out = softmax(q @ keys.T / sqrt(d) + causal_mask) @ values
        ```
    """
    refuse_transforms("cached_attention", INSTEAD, q, k, v, k_cache, v_cache, lengths, cos, sin)
    check_tensor("k_cache", k_cache, ("B", "S", "H_kv", "d"))
    S = k_cache.shape[1]
    check_attention(q, k, v, cos, sin, rotary, window, temperature, cache=S)
    B, n = q.shape[:2]
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_tensor(name, cache, (B, S, *k.shape[2:]), like=q)
    check_same_dtype("q", {"q": q, "k_cache": k_cache, "v_cache": v_cache})
    if isinstance(lengths, int):
        shortest = longest = lengths
        lengths = torch.full((B,), lengths, dtype=torch.int32, device=q.device)
    else:
        if not isinstance(lengths, torch.Tensor):
            raise TypeError(f"lengths: expected an int or an int32 tensor ({B},), got {type(lengths).__name__}")
        if lengths.dtype != torch.int32 or lengths.shape != (B,):
            raise ValueError(f"lengths: expected int32 ({B},), got {lengths.dtype} {tuple(lengths.shape)}")
        readable = lengths.device.type == "cpu" and not is_intercepted()
        shortest, longest = (int(m) for m in lengths.aminmax()) if readable and B else (0, 0)
    if shortest < 0 or longest + n > S:
        raise ValueError(f"lengths: {shortest} .. {longest} cached and {n} new tokens do not fit a cache of {S}")
    with torch.no_grad():
        options = rotary, window or 0, temperature
        return call("cached_attention", q, k, v, k_cache, v_cache, lengths, cos, sin, *options, backend=backend)
