"""Causal attention on the CPU by the kernel of csrc/cpu/causal_attention.cpp."""

from __future__ import annotations

from typing import get_args

import torch

from ..spec import Rotary

ROTARY = get_args(Rotary)


def refuse(q, k, v, cos, sin, rotary, window, temperature) -> str | None:
    """Why the kernel cannot run, or None."""
    if q.device.type != "cpu":
        return f"it runs on the CPU, q is on {q.device}"
    if q.dtype != torch.float32:
        return f"q is {q.dtype}, it takes float32"
    return None


def refuse_backward(grads, outputs, *args) -> str | None:
    """The same for the gradient."""
    return refuse(*args)


def heads(x: torch.Tensor) -> torch.Tensor:
    """x (B, T, H, d) with the values of a head adjacent."""
    return x if x.stride(-1) == 1 else x.contiguous()


def angles(cos: torch.Tensor | None, sin: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The angles as the kernels read them."""
    return [None if t is None else t.to(torch.float32).contiguous() for t in (cos, sin)]


def causal_attention(q, k, v, cos, sin, rotary, window, temperature) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.causal_attention."""
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2], q.shape[1])
    torch.ops.starflow_native.causal_attention(
        *map(heads, (q, k, v)), *angles(cos, sin), ROTARY.index(rotary), window, temperature, out, lse
    )
    return out, lse


def causal_attention_backward(grads, outputs, q, k, v, cos, sin, rotary, window, temperature) -> list[torch.Tensor]:
    """See reference.causal_attention_backward."""
    grad_out = None if grads[0] is None else heads(grads[0])
    grad_lse = None if grads[1] is None else grads[1].contiguous()
    found = [t.new_empty(t.shape) for t in (q, k, v)]
    options = *angles(cos, sin), ROTARY.index(rotary), window, temperature
    torch.ops.starflow_native.causal_attention_backward(
        grad_out, grad_lse, outputs[1].contiguous(), *map(heads, (q, k, v)), *options, *found
    )
    return found
