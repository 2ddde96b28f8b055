"""Attention of new tokens over a KV cache: the specification in plain PyTorch."""

from __future__ import annotations

import torch

from ..causal_attention.reference import attend, causal, rotate


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
    """Rotate, append to the cache at `lengths`, attend over prefix and causal self."""
    B, n = q.shape[:2]
    position = lengths.long().unsqueeze(1) + torch.arange(n, device=q.device)
    if rotary != "none":
        cos, sin = cos[position], sin[position]
    row = torch.arange(B, device=q.device).unsqueeze(1)
    k_cache[row, position] = rotate(k, cos, sin, rotary)
    v_cache[row, position] = v
    used = int(position.max()) + 1 if B else 0
    visible = causal(position, torch.arange(used, device=q.device), window)
    # Unused slots may hold anything, NaN included, and 0 * NaN is NaN.
    seen = visible.any(1)[..., None, None]
    keys, values = (torch.where(seen, cache[:, :used], 0) for cache in (k_cache, v_cache))
    return attend(rotate(q, cos, sin, rotary), keys, values, visible, temperature)[0]
