"""Flow with one attention layer, composed of the ops `causal_attention` and `flow_head`."""

from __future__ import annotations

import torch

from .._core.dispatch import choose, run


def _arguments(x, q, k, v, weight, bias, cos, sin, rotary, window, temperature, *options) -> tuple[tuple, tuple]:
    """Return the arguments of `causal_attention` and of `flow_head`, with a placeholder for the attention output."""
    placeholder = q.new_empty(1).expand(*q.shape[:2], q.shape[2] * q.shape[3])
    attention = q, k, v, cos, sin, rotary, window, temperature
    return attention, (x, placeholder, weight, bias, None, *options)


def refuse(*args) -> str | None:
    """Return why the ops should not run these arguments, or None."""
    for op, arguments in zip(("causal_attention", "flow_head"), _arguments(*args)):
        if choose(op, *arguments) == "reference":
            return f"{op} has its reference alone for these arguments"
    return None


def refuse_backward(grads, outputs, *args) -> str | None:
    """Return why the ops should not compute the gradient, or None."""
    return refuse(*args)


def attention_flow(*args) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See reference.attention_flow."""
    attention, (x, _, *head) = _arguments(*args)
    out, lse = run("causal_attention", None, *attention)
    return *run("flow_head", None, x, out.flatten(2), *head), lse


def attention_flow_backward(grads, outputs, *args) -> list[torch.Tensor]:
    """See reference.attention_flow_backward."""
    attention, (x, _, *head) = _arguments(*args)
    out, _ = run("causal_attention", None, *attention)
    head_grads = run("flow_head_backward", None, grads[:2], outputs[:2], x, out.flatten(2), *head)
    grad_x, grad_h, *weight_grads = head_grads
    grads, outputs = [grad_h.view(out.shape), grads[2]], [out, outputs[2]]
    return [grad_x, *run("causal_attention_backward", None, grads, outputs, *attention), *weight_grads]
