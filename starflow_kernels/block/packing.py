"""Form in which the compiled kernels receive a block: its spec as numbers, and its weights, which are packed once."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch

from .._core.torch_private import version
from ..spec import BlockSpec, Mlp, Norm, Rotary, Scale, choice_index


def spec_fields(spec: BlockSpec, dtype: torch.dtype, rounded: bool = False) -> list[int]:
    """Return the spec as numbers in the order of csrc/read_spec.h; rounded: inputs of products are in bfloat16."""
    sizes = (spec.token_dim, spec.channels, spec.layers, spec.heads, spec.head_dim, spec.kv_heads, spec.mlp_dim)
    optional = (spec.positions, spec.text_dim, spec.transition_dim)
    flags = (spec.start, spec.flip, spec.bias, spec.qk_norm, spec.qk_layer_norm, spec.post_norm, spec.final_norm)
    choices = (
        choice_index(spec.mlp, Mlp),
        choice_index(spec.norm, Norm),
        choice_index(spec.rotary, Rotary),
        choice_index(spec.affine.scale, Scale),
    )
    products = (spec.adaptive, dtype == torch.bfloat16, rounded)
    return [*sizes, *optional, *map(int, (*flags, *products)), *choices]


def refuse_spec(spec: BlockSpec) -> str | None:
    """Return why the kernels that know no adaptive blocks cannot run a block, or None."""
    if spec.adaptive or spec.qk_layer_norm:
        return "it takes no adaptive block, and no LayerNorm of queries and keys"
    return None


def refuse_rounding(*others) -> str | None:
    """Return why kernels without products of rounded inputs cannot run a block, or None; others: arguments of an op."""
    if any(isinstance(each, str) and each == "bfloat16" for each in others):
        return "quantize='bfloat16' takes products of bfloat16 values, which it has not"
    return None


class WeightCache:
    """Cache of what is made from the weights of blocks, dropped when the memory of the first weight is freed.

    Args:
        make: make(spec, weights, *options) returns the value.
        state: state(spec_json, weights) returns what the value depends on; a value is valid while this stays equal.
            Version counters of torch are no such state, since fused optimizers, `.data`, views in other libraries and
            other processes change weights without incrementing them.
    """

    def __init__(self, make: Callable, state: Callable):
        self.make, self.state, self.kept = make, state, {}

    def __call__(self, spec_json: str, weights: list[torch.Tensor], *options: str, state: object = None):
        """Return make(spec, weights, *options), from the cache where it is valid; `state`, if it is known already."""
        storage = weights[0].untyped_storage()
        key = id(storage), weights[0].storage_offset(), spec_json, *options
        state = self.state(spec_json, weights) if state is None else state
        if (entry := self.kept.get(key)) and entry[0] == state:
            return entry[1]
        versions = list(map(version, weights))
        # A tensor made in inference mode could not be used in training later.
        with torch.inference_mode(False), torch.no_grad():
            value = self.make(BlockSpec.from_json(spec_json), weights, *options)
        # Another thread may have written meanwhile, possibly the old values at the end, so that only versions differ.
        if self.state(spec_json, weights) != state or list(map(version, weights)) != versions:
            return value
        # torch.utils.swap_tensors refuses tensors with weak references, so the reference is to the storage.
        self.kept[key] = state, value, weakref.ref(storage, lambda _: self.kept.pop(key, None))
        return value
