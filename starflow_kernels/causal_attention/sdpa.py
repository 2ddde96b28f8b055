"""Causal attention by torch's fused CPU kernel, the rotation before it."""

from __future__ import annotations

import torch

from .reference import rotate

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def refuse(q, k, v, cos, sin, rotary, window, temperature) -> str | None:
    """Why these arguments cannot run here, or None."""
    if q.device.type != "cpu":
        return f"it runs on the CPU, not on {q.device.type}"
    return "it has no window" if window else None


def refuse_backward(grads, outputs, *args) -> str | None:
    """Why these arguments cannot run here, or None."""
    if grads[1] is not None:
        return "it has no gradient of the log-sum-exp"
    return refuse(*args)


def _heads_first(*tensors: torch.Tensor) -> list[torch.Tensor]:
    # The fused kernel takes the last stride to be 1 and does not look.
    return [(t if t.stride(-1) == 1 else t.contiguous()).transpose(1, 2) for t in tensors]


def causal_attention(q, k, v, cos, sin, rotary, window, temperature) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.causal_attention."""
    scale = q.shape[-1] ** -0.5 / temperature
    inputs = _heads_first(rotate(q, cos, sin, rotary), rotate(k, cos, sin, rotary), v)
    out, lse = _forward(*inputs, 0.0, True, scale=scale)
    return out.transpose(1, 2), lse


def causal_attention_backward(grads, outputs, q, k, v, cos, sin, rotary, window, temperature) -> list[torch.Tensor]:
    """See reference.causal_attention_backward."""
    grad_out = torch.zeros_like(q) if grads[0] is None else grads[0]
    inputs = _heads_first(grad_out, rotate(q, cos, sin, rotary), rotate(k, cos, sin, rotary), v, outputs[0])
    scale = q.shape[-1] ** -0.5 / temperature
    found = _backward(*inputs, outputs[1], 0.0, True, scale=scale)
    grad_q, grad_k, grad_v = (t.transpose(1, 2) for t in found)
    back = None if sin is None else -sin
    return [rotate(grad_q, cos, back, rotary), rotate(grad_k, cos, back, rotary), grad_v]
