"""Form in which the compiled kernels receive a block: its spec as numbers, and its weights, which are packed once."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch

from .._core.torch_private import version_of
from ..spec import BlockSpec, Mlp, Norm, Rotary, Scale, choice_index


def spec_fields(spec: BlockSpec, dtype: torch.dtype) -> list[int]:
    """Return the spec as numbers in the order of csrc/read_spec.h."""
    sizes = (spec.token_dim, spec.channels, spec.layers, spec.heads, spec.head_dim, spec.kv_heads, spec.mlp_dim)
    flags = (spec.start, spec.flip, spec.bias, spec.qk_norm, spec.post_norm, spec.final_norm, dtype == torch.bfloat16)
    choices = (
        choice_index(spec.mlp, Mlp),
        choice_index(spec.norm, Norm),
        choice_index(spec.rotary, Rotary),
        choice_index(spec.affine.scale, Scale),
    )
    return [*sizes, spec.positions, spec.text_dim, *map(int, flags), *choices]


class WeightCache:
    """Cache of `make(spec, weights, *options)`, valid while torch's version counters show no write to the weights.

    Writes through `.data` do not increment the version and are not noticed. Tensors made in inference mode have no
    version, so every call packs them again.
    """

    def __init__(self, make: Callable):
        self.make, self.kept = make, {}

    def __call__(self, spec_json: str, weights: list[torch.Tensor], *options: str):
        """Return make(spec, weights, *options), from the cache where it is valid."""
        if any(map(torch.Tensor.is_inference, weights)):
            return self.make(BlockSpec.from_json(spec_json), weights, *options)
        key = id(weights[0]), spec_json, *options
        state = [*map(id, weights), *map(version_of, weights), *map(torch.Tensor.data_ptr, weights)]
        if (entry := self.kept.get(key)) and entry[0] == state:
            return entry[1]
        # A tensor made in inference mode could not be used in training later, and has no version.
        with torch.inference_mode(False), torch.no_grad():
            result = self.make(BlockSpec.from_json(spec_json), weights, *options)
        # An id identifies a weight only while the weight is alive.
        self.kept[key] = state, result, [weakref.ref(w, lambda _: self.kept.pop(key, None)) for w in weights]
        return result
