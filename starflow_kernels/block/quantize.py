"""Weights of one byte a value for sampling: symmetric, with a float32 scale for every output channel of a matrix."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import torch

from ..spec import BlockSpec
from .packing import Remembered

Quantize = Literal["none", "int8", "fp8"]
# Of each kind: the dtype of the values and the largest of them.
KINDS = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}


def chosen(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a weight of a block is quantised: the matrices of its layers are.

    They are nearly all bytes that a step reads. Norms, biases, position table and start token are small; the error of
    the first and the last projection would go into the tokens themselves, and that of text is read once.
    """
    return name.startswith("layers.") and len(shape) == 2


def quantised(weight: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (N, K) of one byte and scales (N,) of a finite weight (N, K), about their product."""
    dtype, most = KINDS[kind]
    wide = weight.detach().float()
    scales = wide.abs().amax(1) / most
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    values = (wide / scales[:, None]).clamp(-most, most)
    return (values if dtype.is_floating_point else values.round()).to(dtype), scales


def _rounded(spec: BlockSpec, weights: list[torch.Tensor], kind: str) -> list[torch.Tensor]:
    found = []
    # What is made in inference mode would have no version counter, and be packed again by every call.
    with torch.inference_mode(False), torch.no_grad():
        for (name, shape), weight in zip(spec.weight_shapes.items(), weights):
            if chosen(name, shape):
                values, scales = quantised(weight, kind)
                wide = torch.promote_types(weight.dtype, torch.float32)
                weight = (values.to(wide) * scales[:, None].to(wide)).to(weight.dtype)
            # A tensor of its own, by whose id a backend knows it.
            found.append(weight.detach())
    return found


_remembered = Remembered(_rounded)


def rounded(text: str, weights: list[torch.Tensor], kind: str) -> list[torch.Tensor]:
    """Weights of a block, those that are `chosen` rounded to values times scales; their dtypes stay."""
    return weights if kind == "none" else _remembered(text, weights, kind)


def on_rounded(run: Callable) -> Callable:
    """`block_inverse` of a backend that has no kernels for one-byte weights."""

    @functools.wraps(run)
    def inverse(z, weights, cond, prefix, cos, sin, guidance, text, rule, temperature, quantize="none"):
        weights = rounded(text, weights, quantize)
        return run(z, weights, cond, prefix, cos, sin, guidance, text, rule, temperature)

    return inverse
