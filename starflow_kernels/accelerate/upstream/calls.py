"""Calls of the block ops with the weights and conditions of upstream flow blocks."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import nn

from ..._core.implicit import needs_gradient
from ..._core.torch_private import is_intercepted
from ...block.api import block_forward, block_inverse
from ...spec import BlockSpec
from .checked import Checked
from .structure import Unfit, read

DTYPES = (torch.float32, torch.bfloat16)
# Tokens of a batch times squared width from which the density ops save more time than their calls take.
DENSITY_FROM = 2**20
# Rules of guidance by `lerp_style`, None in TarFlow; the style that iTARFlow names after TarFlow is a rule of its own.
RULES = {None: "tarflow", "tarflow": "itarflow", "starflow": "starflow"}


def stays_original(block: Any, x: torch.Tensor) -> bool:
    """Return whether the original method computes the density: it is traced, or so small that it takes less time.

    Args:
        block: upstream flow block.
        x: (B, ..., D) tokens.
    """
    width = getattr(block.proj_in, "out_features", 0)
    return torch.compiler.is_compiling() or x.shape[:-1].numel() * width**2 < DENSITY_FROM


def _ready(
    block: Any, x: torch.Tensor, rotary: bool = False, sampling: bool = False
) -> tuple[torch.Tensor, BlockSpec, dict[str, torch.Tensor]]:
    """Return tokens (B, T, D) in float32, and the spec and weights of a call.

    Args:
        block: upstream flow block.
        x: (B, ..., D) tokens.
        rotary: whether the call has rotary positions.
        sampling: whether the call is an inverse.

    Raises:
        Unfit: the original method must compute the call.
    """
    if is_intercepted():
        raise Unfit("torch compiles, traces or transforms the call")
    order = torch.arange(math.prod(x.shape[1:-1]), dtype=torch.int64, device="cpu")
    own = block.permutation(order.view(1, *x.shape[1:-1], 1)).flatten()
    flip = not torch.equal(own, order)
    if flip and not torch.equal(own, order.flip(0)):
        raise Unfit("its order of the tokens is neither that of the data nor the reverse")
    spec, weights, classes = read(block, flip, rotary)
    if isinstance(block, Checked):
        block.check_parts(classes)
    if not {x.dtype, *(weight.dtype for weight in weights.values())}.issubset(DTYPES):
        raise Unfit("its dtype is neither float32 nor bfloat16")
    # With a gradient, the density is composed of operations on which autocast acts.
    if torch.is_autocast_enabled(x.device.type) and (sampling or not torch.is_grad_enabled()):
        dtype = torch.get_autocast_dtype(x.device.type)
        weights = {name: weight.to(dtype) for name, weight in weights.items()}
    return x.float().flatten(1, -2), spec, weights


def _condition(block: Any, y: torch.Tensor | None, t: torch.Tensor | None, rows: int) -> torch.Tensor | None:
    """Return what a block of TarFlow adds to every token, (rows, C): embeddings of classes and of noise levels."""
    terms = [] if t is None else [block.time_embed(t)]
    if block.class_embed is not None:
        terms.append(block.class_embed.mean(0) if y is None else block.class_embed[y].flatten(0, -2))
    return sum(terms).expand(rows, -1) if terms else None


def density(
    block: Any, x: torch.Tensor, y: torch.Tensor | None = None, t: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noise and mean log-determinant (B,) of data x (B, T, D) by a block of TarFlow or iTARFlow."""
    if block.training and getattr(block, "attn_dropout", 0):
        raise Unfit("its attention drops values")
    tokens, spec, weights = _ready(block, x)
    cond = _condition(block, y, t, len(x))
    if cond is not None and y is not None and (y < 0).any():
        cond = torch.where((y < 0)[:, None], _condition(block, None, t, len(x)), cond)
    z, logdet = block_forward(tokens, weights, spec, cond=cond, logdet="mean")
    return _own(z, x), logdet.to(x.dtype)


def _own(z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return noise z in the dtype of x, which a caller may change in place before the backward pass."""
    return z.to(x.dtype, copy=z.requires_grad)


def inverse(
    block: Any,
    z: torch.Tensor,
    y: torch.Tensor | None = None,
    t: torch.Tensor | None = None,
    guidance: float = 0,
    guide_what: str = "ab",
    attn_temp: float = 1.0,
    annealed_guidance: bool = False,
    lerp_style: str | None = None,
) -> torch.Tensor:
    """Return data (B, T, D) by a block of TarFlow, or of iTARFlow with its `lerp_style`."""
    guides = guidance > 0 and guide_what
    if guides and lerp_style is None and not {"a", "b"}.issubset(guide_what):
        raise Unfit("guidance acts on one of the two parameters")
    # Under STARFlow's rule, iTARFlow takes the ratio of deviations of the first sample for all samples.
    if guides and (lerp_style not in RULES or (lerp_style == "starflow" and len(z) > 1)):
        raise Unfit("guidance depends on the batch, or has another style")
    tokens, spec, weights = _ready(block, z, sampling=True)
    B, T, _ = tokens.shape
    if spec.positions > T:
        # The original inverts the first tokens of its own order alone.
        table = weights["pos_embed"]
        weights["pos_embed"] = table[-T:] if spec.flip else table[:T]
        spec = dataclasses.replace(spec, positions=T)
    cond = _condition(block, y, t, B)
    guided: dict[str, Any] = {}
    if guides:
        if needs_gradient(z):
            raise Unfit("guided samples have no gradient")
        if cond is not None:
            cond = torch.cat([cond, _condition(block, None, t, B)]).detach()  # type: ignore[list-item]
        ramp = torch.arange(T, dtype=torch.float64, device=z.device) / max(T - 1, 1) if annealed_guidance else 1.0
        guided = {"guidance": guidance * ramp, "rule": RULES[lerp_style], "temperature": attn_temp}
    return block_inverse(tokens, weights, spec, cond=cond, **guided).x.to(z.dtype)


def grid_density(
    block: Any, x: torch.Tensor, y: torch.Tensor | None, rope: nn.Module | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noise and log-determinant of data x (B, ..., D) by a block of STARFlow, the latter (B, T, D)."""
    tokens, spec, weights = _ready(block, x, rotary=rope is not None)
    z, logdet = block_forward(tokens, weights, spec, prefix=y, **_angles(block, x, y, rope), logdet="none")
    # The original log-determinant is in the block's own order.
    return _own(z, x).view_as(x), logdet.flip(1) if spec.flip else logdet


def grid_inverse(
    block: Any, z: torch.Tensor, y: torch.Tensor | None, guidance: float, rope: nn.Module | None
) -> torch.Tensor:
    """Return data (B, ..., D) by a block of STARFlow."""
    tokens, spec, weights = _ready(block, z, rotary=rope is not None, sampling=True)
    guided: dict[str, Any] = {"guidance": guidance, "rule": "starflow"} if guidance > 0 else {}
    if spec.text_dim and (y is None or len(y) != len(z) * (2 if guided else 1)):
        raise Unfit("it has no text states, or those of another batch")
    if guided and needs_gradient(z, y):
        raise Unfit("guided samples have no gradient")
    x = block_inverse(tokens, weights, spec, prefix=y, **_angles(block, z, y, rope), **guided).x
    return x.to(z.dtype).view_as(z)


def _angles(block: Any, x: torch.Tensor, y: torch.Tensor | None, rope: nn.Module | None) -> dict[str, torch.Tensor]:
    """Return cosines and sines of the rotary angles of text states y and tokens x (B, ..., D) of STARFlow."""
    if rope is None:
        return {}
    angles = block.get_freqs_cis(x.float(), y, rope)
    half, positions = angles[:, ::2], math.prod(x.shape[1:-1]) + (0 if y is None else y.shape[1])
    if len(angles) != positions or not torch.equal(half, angles[:, 1::2]):
        raise Unfit("its rotary angles are of another kind")
    return {"cos": half.cos(), "sin": half.sin()}
