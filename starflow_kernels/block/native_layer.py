"""Transformer layer in training on the CPU, by the kernels in csrc/cpu/layer.cpp."""

from __future__ import annotations

import torch

from .._core.compiled import refuse_tensors
from ..spec import BlockSpec, Norm, Rotary, choice_index

WEIGHTS = 12


def kept_values(h: torch.Tensor, spec: BlockSpec) -> int:
    """Return the number of values that the gradient needs beside the arguments."""
    return sum(_sizes(h, spec))


def _sizes(h: torch.Tensor, spec: BlockSpec) -> list[int]:
    """Return the numbers of values of qkv, attended, mid, pre and lse, see csrc/cpu/kernels.h."""
    tokens, attended = h.shape[0] * h.shape[1], spec.heads * spec.head_dim
    width = attended + 2 * spec.kv_heads * spec.head_dim
    return [tokens * n for n in (width, attended, spec.channels, spec.mlp_dim, spec.heads)]


def refuse(h, *args) -> str | None:
    """Return why the kernels cannot run, or None."""
    weights = {f"weight {i}": weight for i, weight in enumerate(args[:WEIGHTS])}
    if reason := refuse_tensors((torch.float32,), h=h, **weights):
        return reason
    return None if h.numel() else "there are no tokens"


def _arguments(kept: torch.Tensor, h, *args) -> tuple:
    """Return the arguments of the native ops up to what is kept, in their order."""
    *weights, cos, sin, drop_attention, drop_mlp, spec_json = args
    spec = BlockSpec.from_json(spec_json)
    qkv, attended, mid, pre, lse = kept.split(_sizes(h, spec))
    tensors = [None if t is None else t.float().contiguous() for t in (cos, sin, drop_attention, drop_mlp)]
    choices = choice_index(spec.norm, Norm), choice_index(spec.rotary, Rotary)
    options = [spec.heads, spec.kv_heads, spec.head_dim, *choices]
    weights = [None if weight is None else weight.contiguous() for weight in weights]
    return h.contiguous(), weights, *tensors, options, qkv, attended, lse, mid, pre.view(*h.shape[:2], spec.mlp_dim)


def block_layer(h, *args) -> tuple[torch.Tensor, torch.Tensor]:
    """See layer.reference."""
    kept, out = (
        h.new_empty(kept_values(h, BlockSpec.from_json(args[-1]))),
        torch.empty_like(h, memory_format=torch.contiguous_format),
    )
    torch.ops.starflow_native.block_layer(*_arguments(kept, h, *args), out)
    return out, kept


def block_layer_backward(grads, outputs, h, *args) -> list[torch.Tensor]:
    """See layer.reference_backward."""
    gradients = [None if t is None else t.new_empty(t.shape) for t in (h, *args[:WEIGHTS])]
    torch.ops.starflow_native.block_layer_backward(
        grads[0].contiguous(), *_arguments(outputs[1], h, *args), gradients[0], gradients[1:]
    )
    return [t for t in gradients if t is not None]
