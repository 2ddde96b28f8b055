"""Comparison of the calls of an upstream flow block with its own methods."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..swap import AGREEMENT, seen_as
from .calls import density, grid_density, grid_inverse, inverse

# Largest relative difference between two results in bfloat16.
BFLOAT16_AGREEMENT = 5e-2


class _Rotary:
    """Rotary angles of a check; a block calls it with positions (n, axes)."""

    is_1d = False
    pt_seq_len = 2

    def __init__(self, head_dim: int):
        self.frequencies = torch.arange(1, head_dim // 2 + 1, dtype=torch.float32, device="cpu").repeat_interleave(2)

    def __call__(self, positions: torch.Tensor) -> torch.Tensor:
        return positions.sum(1, keepdim=True) * self.frequencies.to(positions)


def _with_random_head(module: Any) -> tuple[Any, Callable[..., torch.Tensor]]:
    """Return the block in evaluation mode with a random head, and a function that draws normal numbers.

    A new block has a head of zeros, with which a wrong network would go unnoticed.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    head = copy.copy(module.proj_out)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(head.weight)

    block = seen_as(type(module), module)
    vars(block)["_modules"] = {**vars(module)["_modules"], "proj_out": head}
    vars(head)["_parameters"] = {
        "weight": 0.1 * normal(*head.weight.shape) / head.in_features**0.5,
        "bias": 0.1 * normal(head.out_features),
    }
    vars(block)["training"] = False
    return block, normal


@torch.no_grad()
def check_tarflow(module: nn.Module) -> str | None:
    """Return in what the calls of a block of TarFlow or iTARFlow differ from its own methods, or None."""
    block, normal = _with_random_head(module)
    z = normal(2, len(block.pos_embed), block.proj_in.in_features)
    context: dict[str, Any] = {"t": z.new_full((1, 1), -2.0)} if hasattr(block, "time_embed") else {}
    if block.class_embed is not None:
        context["y"] = torch.zeros(1, dtype=torch.int64, device=z.device)
    x = inverse(block, z, **context)
    found, found_logdet = density(block, x, **context)
    noise, logdet = block(x, **context)
    pairs = {"inverse": (noise, z), "noise": (found, noise), "log-determinant": (found_logdet, logdet)}
    # A few tokens, since the original is slow.
    few = z[:1, :8]
    options = {"guidance": 1.5, "attn_temp": 0.8, "annealed_guidance": True}
    parameters = inspect.signature(block.reverse).parameters
    styles = [{"lerp_style": style} for style in ("tarflow", "starflow")] if "lerp_style" in parameters else [{}]
    for style in styles if "guidance" in parameters else ():
        given = {**context, **options, **style}
        name = " ".join(["guided inverse", *style.values()])
        pairs[name] = inverse(block, few, **given), block.reverse(few.clone(), **given)
    return _difference(pairs)


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
    found, found_logdet = grid_density(block, x, text, rope)
    noise, _, logdet = block(x, text, rope)
    expected = block.reverse(z, texts, weight, rope=rope, kv_cache=type(cache)())
    return _difference(
        {
            "inverse": (noise, z),
            "noise": (found, noise),
            "log-determinant": (found_logdet, logdet),
            "guided inverse": (grid_inverse(block, z, texts, weight, rope), expected),
        }
    )


def _difference(pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> str | None:
    """Return by its name which tensor found differs from the expected one by more than rounding, or None."""
    for name, (found, expected) in pairs.items():
        scale = expected.abs().max().clamp(min=1)
        error = float((found - expected).abs().max() / scale)
        # Not a number is no agreement.
        if not error <= AGREEMENT.get(expected.dtype, BFLOAT16_AGREEMENT):
            return f"the fast {name} differs from the original by {error:.1e}"
    return None
