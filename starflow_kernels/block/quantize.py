"""One-byte weights for sampling: symmetric, with one float32 scale per output channel of a matrix."""

from __future__ import annotations

import torch

from ..spec import BlockSpec

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


def fake_quantize_matrix(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """Return quantized values times scales, (N, K), in the dtype of the weight."""
    values, scales = quantize_matrix(weight, kind)
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (values.to(wide) * scales[:, None].to(wide)).to(weight.dtype)


def fake_quantize(spec: BlockSpec, weights: list[torch.Tensor], kind: str) -> list[torch.Tensor]:
    """Return the weights of a block, of which the quantized ones are replaced by values times scales."""
    if kind == "none":
        return weights
    named = zip(spec.weight_shapes.items(), weights)
    return [fake_quantize_matrix(w, kind) if is_quantized(name, shape) else w for (name, shape), w in named]
