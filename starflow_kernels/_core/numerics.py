"""Numerical functions and constants that several ops share: accumulation dtype, norms, rotary positions, limits."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .torch_private import is_in_transform

# Added to the mean square before the square root.
NORM_EPS = {"layer_norm": 1e-5, "rms_norm": 1e-6}
# A fixed-point iteration has diverged where |x| exceeds this multiple of max(1, max |z|).
DIVERGED = 1e6


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64, float32 for every narrower dtype."""
    return torch.promote_types(dtype, torch.float32)


def norm_statistics(x: torch.Tensor, kind: str, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x (centered for "layer_norm") and 1 / sqrt(mean x^2 + eps) over the last dimension, float32 or wider."""
    y = x.to(accumulation_dtype(x.dtype))
    if kind == "layer_norm":
        y = y - y.mean(-1, keepdim=True)
    return y, torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x rsqrt(mean x^2 + 1e-6) (1 + weight) over the last dimension, computed in float32 or wider."""
    y, inverse_rms = norm_statistics(x, "rms_norm", NORM_EPS["rms_norm"])
    return (y * inverse_rms * (1 + weight.to(y.dtype))).to(x.dtype)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return torch's layer norm over the last dimension, computed in float32 or wider."""
    wide = accumulation_dtype(x.dtype)
    weight, bias = weight.to(wide), bias.to(wide)
    if is_in_transform():
        # The derivative of torch's forward derivative of layer_norm is wrong (torch 2.13).
        y, inverse = norm_statistics(x, "layer_norm", NORM_EPS["layer_norm"])
        return (y * inverse * weight + bias).to(x.dtype)
    return F.layer_norm(x.to(wide), x.shape[-1:], weight, bias, NORM_EPS["layer_norm"]).to(x.dtype)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None, rotary: str) -> torch.Tensor:
    """Rotate the pairs of x (..., T, heads, head_dim) by the angles of cos, sin (..., T, head_dim / 2).

    Pairs are (x_0, x_1), (x_2, x_3), ... for "interleaved", (x_i, x_{i + head_dim / 2}) for "half"; "none" returns x.
    """
    if rotary == "none":
        return x
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    y = x.to(accumulation_dtype(x.dtype))
    first, second = (y[..., 0::2], y[..., 1::2]) if rotary == "interleaved" else y.chunk(2, dim=-1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    y = torch.stack(pair, dim=-1).flatten(-2) if rotary == "interleaved" else torch.cat(pair, dim=-1)
    return y.to(x.dtype)


def undo_rotary(x: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None, rotary: str) -> torch.Tensor:
    """Rotate back: the inverse of `apply_rotary`, and its gradient."""
    return apply_rotary(x, cos, None if sin is None else -sin, rotary)


def last_dim_contiguous(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors with stride 1 in their last dimension, each copied only where its stride differs."""
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]
