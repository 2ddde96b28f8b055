"""Causal attention by the package flash-attn, if it is installed; this module rotates queries and keys first."""

from __future__ import annotations

import functools
import importlib
import operator
from collections.abc import Callable

import torch

from .._core.numerics import last_dim_contiguous
from .external import apply_rotary, refuse_heads, undo_rotary


@functools.cache
def flash_functions() -> tuple[Callable, Callable] | str:
    """Return the forward and the backward function of flash-attn, or why they cannot be imported."""
    try:
        # Other packages may install an empty namespace of this name, so check for the functions.
        module = importlib.import_module("flash_attn.flash_attn_interface")
        # The backward function has no public name.
        return operator.attrgetter("flash_attn_func", "_flash_attn_backward")(module)
    except Exception as error:
        return f"flash-attn cannot be used: {type(error).__name__}: {error}"


@functools.cache
def unavailable() -> str | None:
    """Return why flash-attn cannot be used on this machine, or None."""
    if torch.cuda.device_count() == 0:
        return "torch sees no GPU"
    functions = flash_functions()
    return functions if isinstance(functions, str) else None


def refuse(q, k, v, cos, sin, rotary, window, temperature) -> str | None:
    """Return why flash-attn cannot take these arguments, or None."""
    return refuse_heads(q)


def refuse_backward(grads, outputs, *args) -> str | None:
    """Return why the backward function of flash-attn cannot take these arguments, or None."""
    if grads[1] is not None:
        return "it has no gradient of the log-sum-exp"
    return refuse(*args)


def causal_attention(q, k, v, cos, sin, rotary, window, temperature) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.causal_attention."""
    attention, _ = flash_functions()
    inputs = last_dim_contiguous(apply_rotary(q, cos, sin, rotary), apply_rotary(k, cos, sin, rotary), v)
    out, lse, _ = attention(
        *inputs,
        softmax_scale=q.shape[-1] ** -0.5 / temperature,
        causal=True,
        window_size=(window - 1, 0) if window else (-1, -1),
        return_attn_probs=True,
    )
    return out, lse


def causal_attention_backward(grads, outputs, q, k, v, cos, sin, rotary, window, temperature) -> list[torch.Tensor]:
    """See reference.causal_attention_backward."""
    _, backward = flash_functions()
    grad_out = torch.zeros_like(q) if grads[0] is None else grads[0]
    rotated = apply_rotary(q, cos, sin, rotary), apply_rotary(k, cos, sin, rotary)
    inputs = last_dim_contiguous(grad_out, *rotated, v, outputs[0])
    grad_q, grad_k, grad_v = (t.new_empty(t.shape) for t in (q, k, v))
    backward(
        *inputs,
        outputs[1],
        grad_q,
        grad_k,
        grad_v,
        dropout_p=0.0,
        softmax_scale=q.shape[-1] ** -0.5 / temperature,
        causal=True,
        window_size_left=window - 1 if window else -1,
        window_size_right=0 if window else -1,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=True,
    )
    return [undo_rotary(grad_q, cos, sin, rotary), undo_rotary(grad_k, cos, sin, rotary), grad_v]
