"""Attention of new tokens over a KV cache: the specification in plain PyTorch."""

from __future__ import annotations

import torch

from .._core.numerics import apply_rotary
from ..causal_attention.reference import attend, causal


def cached_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    rotary: str,
    window: int,
    temperature: float,
) -> torch.Tensor:
    """Rotate the new tokens, write them to the cache at `lengths`, and attend from them to the filled slots."""
    B, n = q.shape[:2]
    position = lengths.long().unsqueeze(1) + torch.arange(n, dtype=torch.int64, device=q.device)
    if rotary != "none":
        cos, sin = cos[position], sin[position]
    row = torch.arange(B, dtype=torch.int64, device=q.device).unsqueeze(1)
    k_cache[row, position] = apply_rotary(k, cos, sin, rotary)
    v_cache[row, position] = v
    used = int(position.max()) + 1 if B else 0
    visible = causal(position, torch.arange(used, dtype=torch.int64, device=q.device), window)
    # Unused slots may hold NaN, and 0 * NaN is NaN.
    seen = visible.any(1)[..., None, None]
    keys, values = (torch.where(seen, cache[:, :used], 0) for cache in (k_cache, v_cache))
    return attend(apply_rotary(q, cos, sin, rotary), keys, values, visible, temperature)[0]
