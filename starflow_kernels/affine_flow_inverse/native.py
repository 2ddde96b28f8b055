"""Inverse affine transform on the CPU by the kernel of csrc/cpu/affine_flow_inverse.cpp."""

from __future__ import annotations

import torch

from .._core.compiled import empty
from ..affine_flow.native import DTYPES, SCALES, WIDEST

RULES = ("tarflow", "starflow")


def refuse(z: torch.Tensor, params: torch.Tensor, *others) -> str | None:
    """Why the kernel cannot run, or None."""
    if z.device.type != "cpu":
        return f"it runs on the CPU, z is on {z.device}"
    if not (z.dtype in DTYPES and params.dtype in DTYPES):
        return f"z is {z.dtype} and params are {params.dtype}, it takes float32, bfloat16 and float16"
    return f"tokens of {z.shape[2]} values, it takes up to {WIDEST}" if z.shape[2] > WIDEST else None


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy, with the values of a token side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def affine_flow_inverse_out(z, params, guidance, scale, soft_clip, rule, out) -> None:
    """x = mu + sigma z, written into `out`."""
    guidance = None if guidance is None else guidance.to(torch.float32).contiguous()
    to = out if out.stride(-1) == 1 else empty(*out.shape, dtype=out.dtype)
    options = SCALES.index(scale), soft_clip, RULES.index(rule)
    torch.ops.starflow_native.affine_flow_inverse(_dense(z), params.contiguous(), guidance, *options, to)
    if to is not out:
        out.copy_(to)


def affine_flow_inverse(z, *args) -> torch.Tensor:
    """The same, new."""
    out = empty(*z.shape, dtype=z.dtype)
    affine_flow_inverse_out(z, *args, out)
    return out
