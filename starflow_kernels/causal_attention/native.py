"""Causal attention on the CPU, by the kernel in csrc/cpu/causal_attention.cpp, which computes in float32."""

from __future__ import annotations

import torch

from .._core.compiled import refuse_tensors
from .._core.numerics import last_dim_contiguous
from ..spec import Rotary, choice_index
from .reference import used_output

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refuse(q, k, v, cos, sin, rotary, window, temperature) -> str | None:
    """Return why the kernel cannot run, or None."""
    return refuse_tensors(DTYPES, q=q)


def native_options(cos, sin, rotary: str, window: int, temperature: float) -> tuple:
    """Return the options as the numbers and tensors that the kernels take."""
    cos, sin = (None if t is None else t.to(torch.float32).contiguous() for t in (cos, sin))
    return cos, sin, choice_index(rotary, Rotary), window, temperature


def causal_attention(q, k, v, *options) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.causal_attention."""
    out, lse = q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    torch.ops.starflow_native.causal_attention(*last_dim_contiguous(q, k, v), *native_options(*options), out, lse)
    return out, lse


def causal_attention_backward(grads, outputs, q, k, v, *options) -> list[torch.Tensor]:
    """See reference.causal_attention_backward."""
    _, _, v = used_output(grads, outputs, v)
    grad_out = None if grads[0] is None else last_dim_contiguous(grads[0])[0]
    grad_lse = None if grads[1] is None else grads[1].contiguous()
    gradients = [t.new_empty(t.shape) for t in (q, k, v)]
    inputs = grad_out, grad_lse, outputs[1].contiguous(), *last_dim_contiguous(q, k, v)
    torch.ops.starflow_native.causal_attention_backward(*inputs, *native_options(*options), *gradients)
    return gradients
