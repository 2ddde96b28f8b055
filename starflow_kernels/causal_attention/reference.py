"""Causal attention with rotary positions: the specification in plain PyTorch."""

from __future__ import annotations

import torch

from .._core.numerics import accumulation_dtype, apply_rotary, undo_rotary


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return softmax(q k^T / (temperature sqrt(d))) v over the `visible` (B or 1, n, S) keys, and the log-sum-exp."""
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    dtype = accumulation_dtype(q.dtype)
    scores = torch.einsum("bnhd,bshd->bhns", q.to(dtype), k.to(dtype)) * (q.shape[-1] ** -0.5 / temperature)
    scores = scores.masked_fill(~visible.unsqueeze(1), float("-inf"))
    lse = scores.logsumexp(dim=-1)
    out = torch.einsum("bhns,bshd->bnhd", (scores - lse.unsqueeze(-1)).exp(), v.to(dtype))
    return out.to(q.dtype), lse


def causal(query: torch.Tensor, key: torch.Tensor, window: int) -> torch.Tensor:
    """Return a (..., n, S) mask: whether the queries at positions (..., n) see the keys at positions (S,)."""
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
    """Return causal, windowed softmax attention with rotary positions, and the log-sum-exp of its scores."""
    position = torch.arange(q.shape[1], dtype=torch.int64, device=q.device)
    visible = causal(position, position, window).unsqueeze(0)
    return attend(apply_rotary(q, cos, sin, rotary), apply_rotary(k, cos, sin, rotary), v, visible, temperature)


def used_output(grads, outputs, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradient of the output, the output, and v. They are zero if it was not used: 0 * infinity is NaN."""
    if grads[0] is not None:
        return grads[0], outputs[0], v
    zeros = torch.zeros_like(outputs[0])
    return zeros, zeros, torch.zeros_like(v)


def causal_attention_backward(grads, outputs, q, k, v, cos, sin, rotary, window, temperature) -> list[torch.Tensor]:
    """Return the gradients with respect to q, k and v, from the saved output and log-sum-exp.

    With P = exp(S - lse): dS = P (dO V^T - rowsum(dO O) + dlse).
    """
    grad_out, out, v = used_output(grads, outputs, v)
    grad_lse, lse = 0.0 if grads[1] is None else grads[1].unsqueeze(-1), outputs[1]
    _, T, H, d = q.shape
    dtype, groups, factor = lse.dtype, H // k.shape[2], d**-0.5 / temperature
    keys = apply_rotary(k, cos, sin, rotary).to(dtype).repeat_interleave(groups, dim=2)
    values = v.to(dtype).repeat_interleave(groups, dim=2)
    queries, grad_out = apply_rotary(q, cos, sin, rotary).to(dtype), grad_out.to(dtype)
    position = torch.arange(T, dtype=torch.int64, device=q.device)
    scores = torch.einsum("bnhd,bshd->bhns", queries, keys) * factor
    probability = (scores - lse.unsqueeze(-1)).exp().masked_fill(~causal(position, position, window), 0)
    delta = torch.einsum("bnhd,bnhd->bhn", grad_out, out.to(dtype)).unsqueeze(-1) - grad_lse
    grad_scores = probability * (torch.einsum("bnhd,bshd->bhns", grad_out, values) - delta) * factor
    grad_q = torch.einsum("bhns,bshd->bnhd", grad_scores, keys)
    grad_k, grad_v = (
        torch.einsum("bhns,bnhd->bshd", weight, source).unflatten(2, (-1, groups)).sum(3)
        for weight, source in ((grad_scores, queries), (probability, grad_out))
    )
    grad_q, grad_k = undo_rotary(grad_q, cos, sin, rotary), undo_rotary(grad_k, cos, sin, rotary)
    return [grad.to(like.dtype) for grad, like in ((grad_q, q), (grad_k, k), (grad_v, v))]
