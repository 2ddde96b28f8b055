"""Causal attention by torch's fused kernels, the rotation before them."""

from __future__ import annotations

import torch

from .._core.torch_private import (
    flash_attention_backward_cpu,
    flash_attention_backward_cuda,
    flash_attention_cpu,
    flash_attention_cuda,
)
from .external import adjacent, refuse_heads, turn, turn_back


def refuse(q, k, v, cos, sin, rotary, window, temperature) -> str | None:
    """Why these arguments cannot run here, or None."""
    if q.device.type == "cpu":
        return "it has no window on the CPU" if window else None
    if q.is_cuda and not torch.backends.cuda.is_flash_attention_available():
        return "this build of torch has no fused attention on CUDA"
    return refuse_heads(q)


def refuse_backward(grads, outputs, *args) -> str | None:
    """Why these arguments cannot run here, or None."""
    if grads[1] is not None:
        return "it has no gradient of the log-sum-exp"
    return refuse(*args)


def _heads_first(*tensors: torch.Tensor) -> list[torch.Tensor]:
    # The fused kernel takes the last stride to be 1 and does not look.
    return [t.transpose(1, 2) for t in adjacent(*tensors)]


def _window(window: int) -> dict[str, int]:
    return {"window_size_left": window - 1, "window_size_right": 0} if window else {}


def causal_attention(q, k, v, cos, sin, rotary, window, temperature) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.causal_attention."""
    T, scale = q.shape[1], q.shape[-1] ** -0.5 / temperature
    inputs = turn(q, cos, sin, rotary), turn(k, cos, sin, rotary), v
    if q.is_cuda:
        inputs = *adjacent(*inputs), None, None, T, T
        return flash_attention_cuda(*inputs, 0.0, True, False, scale=scale, **_window(window))[:2]
    out, lse = flash_attention_cpu(*_heads_first(*inputs), 0.0, True, scale=scale)
    return out.transpose(1, 2), lse


def causal_attention_backward(grads, outputs, q, k, v, cos, sin, rotary, window, temperature) -> list[torch.Tensor]:
    """See reference.causal_attention_backward."""
    T, scale = q.shape[1], q.shape[-1] ** -0.5 / temperature
    grad_out = torch.zeros_like(q) if grads[0] is None else grads[0]
    inputs = grad_out, turn(q, cos, sin, rotary), turn(k, cos, sin, rotary), v, outputs[0]
    if q.is_cuda:
        # The last two tensors hold the state of dropout, which is not read.
        unused = q.new_empty(2, dtype=torch.int64)
        inputs = *adjacent(*inputs), outputs[1], None, None, T, T
        found = flash_attention_backward_cuda(*inputs, 0.0, True, unused, unused, scale=scale, **_window(window))
    else:
        found = flash_attention_backward_cpu(*_heads_first(*inputs), outputs[1], 0.0, True, scale=scale)
        found = [t.transpose(1, 2) for t in found]
    grad_q, grad_k, grad_v = found
    return [turn_back(grad_q, cos, sin, rotary), turn_back(grad_k, cos, sin, rotary), grad_v]
