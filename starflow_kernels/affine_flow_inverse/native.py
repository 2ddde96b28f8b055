"""Inverse affine transform on the CPU, by the kernel in csrc/cpu/affine_flow_inverse.cpp."""

from __future__ import annotations

import torch

from .._core.compiled import empty, refuse_tensors
from .._core.numerics import last_dim_contiguous
from ..affine_flow.native import DTYPES, refuse_width
from ..spec import GuidanceRule, Scale, choice_index


def refuse(z: torch.Tensor, params: torch.Tensor, *others) -> str | None:
    """Return why the kernel cannot run, or None."""
    return refuse_tensors(DTYPES, z=z, params=params) or refuse_width(z)


def affine_flow_inverse_out(z, params, guidance, scale, soft_clip, rule, out) -> None:
    """See reference.affine_flow_inverse_out."""
    guidance = None if guidance is None else guidance.to(torch.float32).contiguous()
    target = out if out.stride(-1) == 1 else empty(*out.shape, dtype=out.dtype)
    options = choice_index(scale, Scale), soft_clip, choice_index(rule, GuidanceRule)
    (z,) = last_dim_contiguous(z)
    torch.ops.starflow_native.affine_flow_inverse(z, params.contiguous(), guidance, *options, target)
    if target is not out:
        out.copy_(target)


def affine_flow_inverse(z, *args) -> torch.Tensor:
    """See reference.affine_flow_inverse."""
    out = empty(*z.shape, dtype=z.dtype)
    affine_flow_inverse_out(z, *args, out)
    return out
