"""Comparison of the calls of an upstream flow block with its own methods."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...spec import GuidanceRule
from ..swap import AGREEMENT, seen_as
from .calls import density, grid_density, grid_inverse, inverse

# Largest relative difference between two results in bfloat16.
BFLOAT16_AGREEMENT = 5e-2


class _Rotary:
    """Rotary angles of a check; a block calls it with positions (n, axes)."""

    is_1d = False
    pt_seq_len = 2

    def __init__(self, head_dim: int):
        self.frequencies = torch.arange(1, head_dim // 2 + 1).repeat_interleave(2)

    def __call__(self, positions: torch.Tensor) -> torch.Tensor:
        return positions.sum(1, keepdim=True) * self.frequencies.to(positions)


def _with_random_head(module: Any) -> tuple[Any, Callable[..., torch.Tensor]]:
    """Return the block in evaluation mode with a random head, and a function that draws normal numbers.

    A new block has a head of zeros, with which a wrong network would go unnoticed.
    """
    generator = torch.Generator().manual_seed(0)
    head = copy.copy(module.proj_out)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(head.weight)

    block = seen_as(type(module), module)
    vars(block)["_modules"] = {**vars(module)["_modules"], "proj_out": head}
    vars(head)["_parameters"] = {
        "weight": 0.1 * normal(*head.weight.shape) / head.in_features**0.5,
        "bias": 0.1 * normal(head.out_features),
    }
    vars(block)["training"] = False
    return block, normal


@torch.no_grad()
def check_tarflow(module: nn.Module, level: float | None, rule: GuidanceRule) -> str | None:
    """Return in what the calls of a block of TarFlow or iTARFlow differ from its own methods, or None.

    Args:
        module: the block.
        level: logarithm of a noise level, if the block takes one.
        rule: rule of guidance.
    """
    block, normal = _with_random_head(module)
    z = normal(2, len(block.pos_embed), block.proj_in.in_features)
    y = None if block.class_embed is None else torch.zeros(len(z), dtype=torch.int64, device=z.device)
    t = None if level is None else z.new_full((1, 1), level)
    x = inverse(block, z, y, t, 0, rule, 1, False)
    found, found_logdet = density(block, x, y, t, least=0)
    noise, logdet = block(x, y) if t is None else block(x, y, t)
    # A few tokens, since the original is slow.
    few, label = z[:1, :8], None if y is None else y[:1]
    found_guided = inverse(block, few, label, t, 1.5, rule, 0.8, True)
    options = {} if t is None else {"t": t, "lerp_style": rule}
    guided = block.reverse(few.clone(), label, 1.5, "ab", 0.8, True, **options)
    return _difference(
        inverse=(noise, z),
        noise=(found, noise),
        logdet=(found_logdet, logdet),
        guided_inverse=(found_guided, guided),
    )


@torch.no_grad()
def check_starflow(module: nn.Module) -> str | None:
    """Return in what the calls of a block of STARFlow differ from its own methods on random tokens, or None."""
    block, normal = _with_random_head(module)
    rope: Any = _Rotary(block.attn_blocks[0].attention.head_channels)
    cache = inspect.signature(block.reverse).parameters["kv_cache"].default
    z = normal(2, 2, 3, block.proj_in.in_features)
    texts = normal(4, 5, block.txt_dim) if block.txt_dim else None
    text = None if texts is None else texts[:2]
    weight = 0 if texts is None else 1.5
    x = grid_inverse(block, z, text, 0, rope)
    found, found_logdet = grid_density(block, x, text, rope, least=0)
    noise, _, logdet = block(x, text, rope)
    return _difference(
        inverse=(noise, z),
        noise=(found, noise),
        logdet=(found_logdet, logdet),
        guided_inverse=(
            grid_inverse(block, z, texts, weight, rope),
            block.reverse(z, texts, weight, rope=rope, kv_cache=type(cache)()),
        ),
    )


def _difference(**pairs: tuple[torch.Tensor, torch.Tensor]) -> str | None:
    """Return which tensor found differs from the expected one by more than rounding, or None."""
    for name, (found, expected) in pairs.items():
        scale = expected.abs().max().clamp(min=1)
        error = float((found - expected).abs().max() / scale)
        # Not a number is no agreement.
        if not error <= AGREEMENT.get(expected.dtype, BFLOAT16_AGREEMENT):
            return f"the fast {name.replace('_', ' ')} differs from the original by {error:.1e}"
    return None
