"""Inputs of causal_attention and the same in plain torch."""

from __future__ import annotations

import torch

from support.naive import angles, naive_attention, naive_rotate, naive_visible

F64 = torch.float64


def inputs(B=2, T=7, H=2, H_kv=2, d=8, dtype=F64):
    """Return q (B, T, H, d), k and v (B, T, H_kv, d)."""
    return [torch.randn(B, T, heads, d, dtype=dtype) for heads in (H, H_kv, H_kv)]


def rotary_options(rotary, T, d, dtype=F64):
    """Return the rotary arguments of an op."""
    return {"rotary": rotary, **(angles(T, d, dtype) if rotary != "none" else {})}


def naive(q, k, v, cos=None, sin=None, rotary="none", window=None, temperature=1.0):
    """Return the output by scaled_dot_product_attention, and the log-sum-exp of the scores query by query."""
    T, groups = q.shape[1], q.shape[2] // k.shape[2]
    q, k = naive_rotate(q, cos, sin, rotary), naive_rotate(k, cos, sin, rotary)
    out = naive_attention(q, k, v, naive_visible(range(T), T, window), temperature)
    lse = []
    for t in range(T):
        seen = k[:, max(0, t - window + 1) if window else 0 : t + 1].repeat_interleave(groups, dim=2)
        scores = (q[:, t : t + 1] * seen).sum(-1) / (temperature * q.shape[-1] ** 0.5)
        lse.append(scores.logsumexp(1))
    return out, torch.stack(lse, dim=-1)
