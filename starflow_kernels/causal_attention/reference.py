"""Causal attention with rotary positions: the specification in plain PyTorch."""

from __future__ import annotations

import torch

from ..affine_flow.reference import accumulation_dtype


def rotate(x: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None, rotary: str) -> torch.Tensor:
    """Rotate the pairs of (..., T, heads, head_dim) by the angles of cos, sin (..., T, head_dim / 2).

    Pairs are (x0, x1), (x2, x3), ... for "interleaved" and (x_i, x_{i + head_dim / 2}) for "half".
    """
    if rotary == "none":
        return x
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    y = x.to(accumulation_dtype(x.dtype))
    first, second = (y[..., 0::2], y[..., 1::2]) if rotary == "interleaved" else y.chunk(2, dim=-1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    y = torch.stack(pair, dim=-1).flatten(-2) if rotary == "interleaved" else torch.cat(pair, dim=-1)
    return y.to(x.dtype)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(q k^T / (temperature sqrt(head_dim))) v over visible (B or 1, n, S) keys, and its log-sum-exp."""
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    dtype = accumulation_dtype(q.dtype)
    scores = torch.einsum("bnhd,bshd->bhns", q.to(dtype), k.to(dtype)) * (q.shape[-1] ** -0.5 / temperature)
    scores = scores.masked_fill(~visible.unsqueeze(1), float("-inf"))
    lse = scores.logsumexp(dim=-1)
    out = torch.einsum("bhns,bshd->bnhd", (scores - lse.unsqueeze(-1)).exp(), v.to(dtype))
    return out.to(q.dtype), lse


def causal(query: torch.Tensor, key: torch.Tensor, window: int) -> torch.Tensor:
    """Which key positions (S,) a query at positions (..., n) sees: (..., n, S)."""
    distance = query.unsqueeze(-1) - key
    return (distance >= 0) & (distance < window) if window else distance >= 0


def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    rotary: str,
    window: int,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary, causal, windowed softmax attention and the log-sum-exp of its scores."""
    position = torch.arange(q.shape[1], device=q.device)
    visible = causal(position, position, window).unsqueeze(0)
    return attend(rotate(q, cos, sin, rotary), rotate(k, cos, sin, rotary), v, visible, temperature)


def causal_attention_backward(grads, outputs, q, k, v, cos, sin, rotary, window, temperature) -> list[torch.Tensor]:
    """Gradients with respect to q, k and v from the saved output and log-sum-exp.

    With P = exp(S - lse): dS = P (dO V^T - rowsum(dO O) + dlse), and a rotation is undone by the opposite angle.
    """
    (grad_out, grad_lse), (out, lse) = grads, outputs
    _, T, H, d = q.shape
    dtype, groups, factor = lse.dtype, H // k.shape[2], d**-0.5 / temperature
    keys = rotate(k, cos, sin, rotary).to(dtype).repeat_interleave(groups, dim=2)
    values = v.to(dtype).repeat_interleave(groups, dim=2)
    queries, grad_out = rotate(q, cos, sin, rotary).to(dtype), grad_out.to(dtype)
    position = torch.arange(T, device=q.device)
    scores = torch.einsum("bnhd,bshd->bhns", queries, keys) * factor
    probability = (scores - lse.unsqueeze(-1)).exp().masked_fill(~causal(position, position, window), 0)
    delta = torch.einsum("bnhd,bnhd->bhn", grad_out, out.to(dtype)) - grad_lse
    grad_scores = probability * (torch.einsum("bnhd,bshd->bhns", grad_out, values) - delta.unsqueeze(-1)) * factor
    grad_q = torch.einsum("bhns,bshd->bnhd", grad_scores, keys)
    grad_k, grad_v = (
        torch.einsum("bhns,bnhd->bshd", weight, source).unflatten(2, (-1, groups)).sum(3)
        for weight, source in ((grad_scores, queries), (probability, grad_out))
    )
    back = None if sin is None else -sin
    grad_q, grad_k = rotate(grad_q, cos, back, rotary), rotate(grad_k, cos, back, rotary)
    return [grad.to(like.dtype) for grad, like in ((grad_q, q), (grad_k, k), (grad_v, v))]
