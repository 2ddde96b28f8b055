"""One-byte weights for sampling: symmetric, with one float32 scale per output channel of a matrix."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from ..spec import BlockSpec
from .packing import WeightCache

# Kind -> dtype of the values, and the largest value.
KINDS = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}


def is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a weight is quantized. These are the matrices of the layers, nearly all bytes that a step reads.

    Other weights are kept. Norms, biases, position table and start token are small. An error of the first or last
    projection would enter the tokens directly, and the projection of text is read only once.
    """
    return name.startswith("layers.") and len(shape) == 2


def quantize_matrix(weight: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one-byte values (N, K) and scales (N,) whose product approximates a finite weight (N, K)."""
    dtype, largest = KINDS[kind]
    wide = weight.detach().float()
    scales = wide.abs().amax(1) / largest
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    values = (wide / scales[:, None]).clamp(-largest, largest)
    return (values if dtype.is_floating_point else values.round()).to(dtype), scales


def _make(spec: BlockSpec, weights: list[torch.Tensor], kind: str) -> list[torch.Tensor]:
    result = []
    for (name, shape), weight in zip(spec.weight_shapes.items(), weights):
        if is_quantized(name, shape):
            values, scales = quantize_matrix(weight, kind)
            wide = torch.promote_types(weight.dtype, torch.float32)
            weight = (values.to(wide) * scales[:, None].to(wide)).to(weight.dtype)
        # Make a new tensor object, because caches identify weights by their id.
        result.append(weight.detach())
    return result


fake_quantized = WeightCache(_make)


def fake_quantize(spec_json: str, weights: list[torch.Tensor], kind: str) -> list[torch.Tensor]:
    """Return the weights with the quantized ones replaced by values times scales, in their own dtype."""
    return weights if kind == "none" else fake_quantized(spec_json, weights, kind)


def with_fake_quantized_weights(run: Callable) -> Callable:
    """Give the `block_inverse` of a backend without one-byte kernels its `quantize` argument."""

    @functools.wraps(run)
    def inverse(z, weights, cond, prefix, cos, sin, guidance, spec_json, rule, temperature, quantize="none"):
        weights = fake_quantize(spec_json, weights, quantize)
        return run(z, weights, cond, prefix, cos, sin, guidance, spec_json, rule, temperature)

    return inverse
