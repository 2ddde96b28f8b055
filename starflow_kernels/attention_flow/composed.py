"""Attention flow by the fast ops of its parts, `causal_attention`, then `flow_head`."""

from __future__ import annotations

import torch

from .._core.dispatch import choose, run


def _parts(x, q, k, v, weight, bias, cos, sin, rotary, window, temperature, *options) -> dict[str, tuple]:
    """Arguments of each part; hidden states of the second one stand for those that the first one gives."""
    h = q.new_empty(1).expand(*q.shape[:2], q.shape[2] * q.shape[3])
    attention = q, k, v, cos, sin, rotary, window, temperature
    return {"causal_attention": attention, "flow_head": (x, h, weight, bias, None, *options)}


def refuse(*args) -> str | None:
    """Why these arguments cannot run here, or None."""
    for op, arguments in _parts(*args).items():
        if choose(op, *arguments) == "reference":
            return f"{op} has its reference alone for these arguments"
    return None


def refuse_backward(grads, outputs, *args) -> str | None:
    """The same for the gradient."""
    return refuse(*args)


def attention_flow(*args) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See reference.attention_flow."""
    attention, (x, _, *head) = _parts(*args).values()
    out, lse = run("causal_attention", None, *attention)
    return *run("flow_head", None, x, out.flatten(2), *head), lse


def attention_flow_backward(grads, outputs, *args) -> list[torch.Tensor]:
    """See reference.attention_flow_backward."""
    attention, (x, _, *head) = _parts(*args).values()
    out, _ = run("causal_attention", None, *attention)
    found = run("flow_head_backward", None, grads[:2], outputs[:2], x, out.flatten(2), *head)
    grad_x, grad_h, *of_head = found
    grads, outputs = [grad_h.view(out.shape), grads[2]], [out, outputs[2]]
    return [grad_x, *run("causal_attention_backward", None, grads, outputs, *attention), *of_head]
