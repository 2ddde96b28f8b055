"""Attention over a KV cache on the CPU, by the kernel in csrc/cpu/cached_attention.cpp."""

from __future__ import annotations

import torch

from .._core.compiled import refuse_tensors
from .._core.numerics import last_dim_contiguous
from ..causal_attention.native import native_options


def refuse(q, k, v, k_cache, v_cache, *others) -> str | None:
    """Return why the kernel cannot run, or None."""
    if reason := refuse_tensors((torch.float32,), q=q):
        return reason
    if q.shape[-1] > 1 and not k_cache.stride(-1) == v_cache.stride(-1) == 1:
        return "the values of a head are not adjacent in the caches"
    return None


def cached_attention(q, k, v, k_cache, v_cache, lengths, *options) -> torch.Tensor:
    """See reference.cached_attention."""
    out, inputs = q.new_empty(q.shape), last_dim_contiguous(q, k, v)
    torch.ops.starflow_native.cached_attention(
        *inputs, k_cache, v_cache, lengths.contiguous(), *native_options(*options), out
    )
    return out
