"""Rounding in sampling: one-byte weights, symmetric with one float32 scale per output channel, or bfloat16 products."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..spec import BlockSpec

# Kind -> dtype of the values, and the largest value.
KINDS = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}


def is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a weight is quantized. These are the matrices of the layers, nearly all bytes that a step reads.

    Other weights are kept. Norms, biases, position table and start token are small. An error of the first or last
    projection would enter the tokens directly, and the projection of text is read only once.
    """
    return name.startswith("layers.") and len(shape) == 2


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a weight is the matrix of a product."""
    return len(shape) == 2 and name != "pos_embed"


def linear_of(kind: str) -> Callable:
    """Return the linear layer (x, weight, bias) of a block: with "bfloat16", x is rounded to bfloat16."""
    return _rounded_linear if kind == "bfloat16" else F.linear


def _rounded_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return F.linear(x.to(torch.bfloat16).to(x.dtype), weight, bias)


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
    """Return the weights of a block, of which the quantized ones are replaced by rounded ones, in their own dtype."""
    if kind == "none":
        return weights
    named = zip(spec.weight_shapes.items(), weights)
    if kind == "bfloat16":
        return [w.to(torch.bfloat16).to(w.dtype) if is_matrix(name, shape) else w for (name, shape), w in named]
    return [fake_quantize_matrix(w, kind) if is_quantized(name, shape) else w for (name, shape), w in named]
