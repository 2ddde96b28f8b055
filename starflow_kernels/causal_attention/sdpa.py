"""Causal attention by torch's fused kernels; this module rotates queries and keys first."""

from __future__ import annotations

import torch

from .._core.numerics import accumulation_dtype, last_dim_contiguous
from .._core.torch_private import (
    flash_attention_backward_cpu,
    flash_attention_backward_cuda,
    flash_attention_cpu,
    flash_attention_cuda,
)
from .external import apply_rotary, refuse_heads, undo_rotary

# Up to this many tokens, torch's CPU kernels are slower in bfloat16 than in float32: up to 7 times, with AVX-512.
FLOAT32_TOKENS = 256


def refuse(q, k, v, cos, sin, rotary, window, temperature) -> str | None:
    """Return why torch's kernels cannot take these arguments, or None."""
    if q.device.type == "cpu":
        return "it has no window on the CPU" if window else None
    if q.is_cuda and not torch.backends.cuda.is_flash_attention_available():
        return "this build of torch has no fused attention on CUDA"
    return refuse_heads(q)


def refuse_gradient(grads, q) -> str | None:
    """Return why a fused kernel of torch cannot give this gradient with the same bits each time, or None."""
    if grads[1] is not None:
        return "it has no gradient of the log-sum-exp"
    fixed = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    if q.is_cuda and not fixed:
        return "torch adds dQ in no fixed order unless torch.use_deterministic_algorithms(True) is set"
    return None


def refuse_backward(grads, outputs, *args) -> str | None:
    """Return why torch's backward kernels cannot take these arguments, or None."""
    return refuse_gradient(grads, args[0]) or refuse(*args)


def _heads_first(*tensors: torch.Tensor) -> list[torch.Tensor]:
    # The fused kernel assumes a last stride of 1 and does not check it.
    return [t.transpose(1, 2) for t in last_dim_contiguous(*tensors)]


def _compute_dtype(q: torch.Tensor) -> torch.dtype:
    # On the CPU, float16 is slower than float32 at any length.
    narrow = q.is_cuda or (q.dtype == torch.bfloat16 and q.shape[1] > FLOAT32_TOKENS)
    return q.dtype if narrow else accumulation_dtype(q.dtype)


def _window(window: int) -> dict[str, int]:
    return {"window_size_left": window - 1, "window_size_right": 0} if window else {}


def causal_attention(q, k, v, cos, sin, rotary, window, temperature) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.causal_attention."""
    T, scale, dtype, compute = q.shape[1], q.shape[-1] ** -0.5 / temperature, q.dtype, _compute_dtype(q)
    q, k, v = (t.to(compute) for t in (q, k, v))
    inputs = apply_rotary(q, cos, sin, rotary), apply_rotary(k, cos, sin, rotary), v
    if q.is_cuda:
        inputs = *last_dim_contiguous(*inputs), None, None, T, T
        return flash_attention_cuda(*inputs, 0.0, True, False, scale=scale, **_window(window))[:2]
    out, lse = flash_attention_cpu(*_heads_first(*inputs), 0.0, True, scale=scale)
    return out.transpose(1, 2).to(dtype), lse


def causal_attention_backward(grads, outputs, q, k, v, cos, sin, rotary, window, temperature) -> list[torch.Tensor]:
    """See reference.causal_attention_backward."""
    T, scale, dtype, compute = q.shape[1], q.shape[-1] ** -0.5 / temperature, q.dtype, _compute_dtype(q)
    grad_out = torch.zeros_like(q) if grads[0] is None else grads[0]
    grad_out, q, k, v, out = (t.to(compute) for t in (grad_out, q, k, v, outputs[0]))
    inputs = grad_out, apply_rotary(q, cos, sin, rotary), apply_rotary(k, cos, sin, rotary), v, out
    if q.is_cuda:
        # The last two arguments are the random state of dropout, which is not read.
        unused = q.new_empty(2, dtype=torch.int64)
        inputs = *last_dim_contiguous(*inputs), outputs[1], None, None, T, T
        gradients = flash_attention_backward_cuda(*inputs, 0.0, True, unused, unused, scale=scale, **_window(window))
    else:
        gradients = flash_attention_backward_cpu(*_heads_first(*inputs), outputs[1], 0.0, True, scale=scale)
        gradients = [t.transpose(1, 2) for t in gradients]
    grad_q, grad_k, grad_v = gradients
    gradients = undo_rotary(grad_q, cos, sin, rotary), undo_rotary(grad_k, cos, sin, rotary), grad_v
    return [gradient.to(dtype) for gradient in gradients]
