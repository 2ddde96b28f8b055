"""Causal attention by cuDNN, through torch; this module rotates queries and keys first.

It comes after all other backends of a GPU, so it runs by name, or where it was measured fastest.
"""

from __future__ import annotations

import torch

from .._core.numerics import last_dim_contiguous
from .._core.torch_private import cudnn_attention, cudnn_attention_backward
from . import sdpa
from .external import apply_rotary, refuse_heads, undo_rotary

WIDEST = 128


def unavailable() -> str | None:
    """Return why cuDNN cannot be used on this machine, or None."""
    if torch.cuda.device_count() == 0:
        return "torch sees no GPU"
    return None if torch.backends.cudnn.is_available() else "this build of torch has no cuDNN"


def refuse(q, k, v, cos, sin, rotary, window, temperature) -> str | None:
    """Return why cuDNN cannot take these arguments, or None."""
    _, T, H, d = q.shape
    if 0 < window < T:
        return "it has no window"
    if d > WIDEST:
        return f"heads of {d} values, it takes up to {WIDEST}"
    if k.shape[2] != H:
        return f"{k.shape[2]} heads of keys, it takes as many as there are of queries"
    if T == 1:
        return "it takes two tokens or more"
    return refuse_heads(q)


def refuse_backward(grads, outputs, *args) -> str | None:
    """Return why the backward pass of cuDNN cannot take these arguments, or None."""
    return refuse(*args) or sdpa.refuse_gradient(grads, args[0])


def _heads_first(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.transpose(1, 2) for t in last_dim_contiguous(*tensors)]


def causal_attention(q, k, v, cos, sin, rotary, window, temperature) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.causal_attention."""
    inputs = _heads_first(apply_rotary(q, cos, sin, rotary), apply_rotary(k, cos, sin, rotary), v)
    scale = q.shape[-1] ** -0.5 / temperature
    out, lse, *_ = cudnn_attention(*inputs, None, True, 0.0, True, scale=scale)
    return out.transpose(1, 2).contiguous(), lse.view(lse.shape[:3])


def causal_attention_backward(grads, outputs, q, k, v, cos, sin, rotary, window, temperature) -> list[torch.Tensor]:
    """See reference.causal_attention_backward."""
    T, scale = q.shape[1], q.shape[-1] ** -0.5 / temperature
    grad_out = torch.zeros_like(q) if grads[0] is None else grads[0]
    rotated = apply_rotary(q, cos, sin, rotary), apply_rotary(k, cos, sin, rotary)
    inputs = _heads_first(grad_out, *rotated, v, outputs[0])
    # The random state of dropout, which is not read.
    unused = q.new_empty((), dtype=torch.int64)
    gradients = cudnn_attention_backward(
        *inputs, outputs[1].unsqueeze(-1), unused, unused, None, None, None, T, T, 0.0, True, scale=scale
    )
    grad_q, grad_k, grad_v = (t.transpose(1, 2) for t in gradients)
    return [undo_rotary(grad_q, cos, sin, rotary), undo_rotary(grad_k, cos, sin, rotary), grad_v]
