"""Attention over a KV cache on the CPU by the kernel of csrc/cpu/cached_attention.cpp."""

from __future__ import annotations

import torch

from ..causal_attention.native import ROTARY, angles, heads


def refuse(q, k, v, k_cache, v_cache, *others) -> str | None:
    """Why the kernel cannot run, or None."""
    if q.device.type != "cpu":
        return f"it runs on the CPU, q is on {q.device}"
    if q.dtype != torch.float32:
        return f"q is {q.dtype}, it takes float32"
    if q.shape[-1] > 1 and not k_cache.stride(-1) == v_cache.stride(-1) == 1:
        return "the values of a head are not adjacent in the caches"
    return None


def cached_attention(q, k, v, k_cache, v_cache, lengths, cos, sin, rotary, window, temperature) -> torch.Tensor:
    """See reference.cached_attention."""
    out = q.new_empty(q.shape)
    options = lengths.contiguous(), *angles(cos, sin), ROTARY.index(rotary), window, temperature
    torch.ops.starflow_native.cached_attention(*map(heads, (q, k, v)), k_cache, v_cache, *options, out)
    return out
