"""Causal attention by the package flash-attn where it is installed, the rotation before it."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch

from .external import adjacent, refuse_heads, turn, turn_back


@functools.cache
def _symbols() -> tuple[Callable, Callable] | str:
    """Its forward and its backward pass, or why they cannot be had."""
    try:
        # Other packages install an empty namespace of this name: only the functions tell.
        module = importlib.import_module("flash_attn.flash_attn_interface")
        return module.flash_attn_func, module._flash_attn_backward
    except Exception as error:
        return f"flash-attn cannot be used: {type(error).__name__}: {error}"


@functools.cache
def unavailable() -> str | None:
    """Why it cannot be used on this machine, or None."""
    if torch.cuda.device_count() == 0:
        return "torch sees no GPU"
    found = _symbols()
    return found if isinstance(found, str) else None


def refuse(q, k, v, cos, sin, rotary, window, temperature) -> str | None:
    """Why these arguments cannot run here, or None."""
    return refuse_heads(q)


def refuse_backward(grads, outputs, *args) -> str | None:
    """Why these arguments cannot run here, or None."""
    if grads[1] is not None:
        return "it has no gradient of the log-sum-exp"
    return refuse(*args)


def causal_attention(q, k, v, cos, sin, rotary, window, temperature) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.causal_attention."""
    attention, _ = _symbols()
    inputs = adjacent(turn(q, cos, sin, rotary), turn(k, cos, sin, rotary), v)
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
    _, backward = _symbols()
    grad_out = torch.zeros_like(q) if grads[0] is None else grads[0]
    inputs = adjacent(grad_out, turn(q, cos, sin, rotary), turn(k, cos, sin, rotary), v, outputs[0])
    found = [t.new_empty(t.shape) for t in (q, k, v)]
    backward(
        *inputs,
        outputs[1],
        *found,
        dropout_p=0.0,
        softmax_scale=q.shape[-1] ** -0.5 / temperature,
        causal=True,
        window_size_left=window - 1 if window else -1,
        window_size_right=0 if window else -1,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=True,
    )
    grad_q, grad_k, grad_v = found
    return [turn_back(grad_q, cos, sin, rotary), turn_back(grad_k, cos, sin, rotary), grad_v]
