"""Op of a whole transformer layer in training, for the layers of TarFlow and STARFlow; private, see composed.py.

A layer is h + drop_attention proj(attention(qkv(norm(h)))) = mid, then mid + drop_mlp down(gelu(up(norm(mid)))).
"""

from __future__ import annotations

import dataclasses

import torch

from .._core import compiled
from .._core.registration import define, differentiable
from ..spec import BlockSpec
from . import native_layer, network

# Weights of a layer, in the order of the op's arguments.
NAMES = tuple(
    f"{part}.{leaf}" for part in ("attn_norm", "qkv", "proj", "mlp_norm", "up", "down") for leaf in ("weight", "bias")
)
ARGUMENTS = (
    f"Tensor h, {', '.join('Tensor? ' + name.replace('.', '_') for name in NAMES)}, Tensor? cos, Tensor? sin, "
    "Tensor? drop_attention, Tensor? drop_mlp, str spec"
)


def supports(spec: BlockSpec) -> bool:
    """Return whether the layers of a block have the form of this op."""
    others = spec.qk_norm or spec.qk_layer_norm or spec.post_norm or spec.adaptive or spec.transition_dim
    return spec.mlp == "gelu" and not others


def reference(h, *args) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the states after the layer, and zeros in place of what a backend keeps for the gradient."""
    *weights, cos, sin, drop_attention, drop_mlp, spec_json = args
    spec = dataclasses.replace(BlockSpec.from_json(spec_json), layers=1)
    w = {f"layers.0.{name}": weight for name, weight in zip(NAMES, weights) if weight is not None}
    factors = iter((drop_attention, drop_mlp))

    def drop(branch: torch.Tensor) -> torch.Tensor:
        factor = next(factors)
        return branch if factor is None else branch * factor

    def attention(q, k, v):
        return network.causal_attention(q, k, v, cos, sin, spec.rotary, 0, 1.0)[0]

    kept = h.new_zeros(native_layer.kept_values(h, spec))
    return network.layers(h, w, spec, None, lambda i: attention, drop=drop), kept


def reference_backward(grads, outputs, *args) -> list[torch.Tensor]:
    """Return the gradients with respect to h and the weights that are given."""
    tensors, options = args[: 1 + len(NAMES)], args[1 + len(NAMES) :]
    given = [i for i, tensor in enumerate(tensors) if tensor is not None]

    def run(*values):
        every = list(tensors)
        for i, value in zip(given, values):
            every[i] = value
        return reference(*every, *options)[0]

    _, pull = torch.func.vjp(run, *(tensors[i] for i in given))
    return list(pull(grads[0]))


define(
    "block_layer",
    ARGUMENTS,
    "(Tensor, Tensor)",
    fake=lambda h, *args: (
        h.new_empty(h.shape),
        h.new_empty(native_layer.kept_values(h, BlockSpec.from_json(args[-1]))),
    ),
    reference=reference,
)
differentiable("block_layer", ARGUMENTS, 1 + len(NAMES), reference_backward)
compiled.register("block_layer", native_layer)
