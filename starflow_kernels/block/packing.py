"""How the compiled kernels get a block: its spec as numbers, its weights packed once."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable

import torch

from ..spec import BlockSpec


def spec_fields(spec: BlockSpec, dtype: torch.dtype) -> list[int]:
    """The spec as csrc/read_spec.h reads it."""
    sizes = (spec.token_dim, spec.channels, spec.layers, spec.heads, spec.head_dim, spec.kv_heads, spec.mlp_dim)
    flags = (spec.start, spec.flip, spec.bias, spec.qk_norm, spec.post_norm, spec.final_norm, dtype == torch.bfloat16)
    kinds = (
        ("gelu", "swiglu").index(spec.mlp),
        ("layer_norm", "rms_norm", "none").index(spec.norm),
        ("none", "interleaved", "half").index(spec.rotary),
        ("exp", "softplus", "unit").index(spec.affine.scale),
    )
    return [*sizes, spec.positions, spec.text_dim, *map(int, flags), *kinds]


_version = operator.attrgetter("_version")


class Remembered:
    """`make(spec, weights, *options)`, remembered while torch's version counters say that the weights are unchanged.

    Writes through `.data` do not count up a version; tensors of inference mode have none and are packed every time.
    """

    def __init__(self, make: Callable):
        self.make, self.kept = make, {}

    def __call__(self, text: str, weights: list[torch.Tensor], *options: str):
        if any(map(torch.Tensor.is_inference, weights)):
            return self.make(BlockSpec.from_json(text), weights, *options)
        key = id(weights[0]), text, *options
        state = [*map(id, weights), *map(_version, weights), *map(torch.Tensor.data_ptr, weights)]
        if (found := self.kept.get(key)) and found[0] == state:
            return found[1]
        result = self.make(BlockSpec.from_json(text), weights, *options)
        # An id is that of a weight only while the weight lives.
        self.kept[key] = state, result, [weakref.ref(w, lambda _: self.kept.pop(key, None)) for w in weights]
        return result
