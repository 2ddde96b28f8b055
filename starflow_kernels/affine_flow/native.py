"""Affine flow transform on the CPU, by the kernel in csrc/cpu/affine_flow.cpp."""

from __future__ import annotations

import torch

from .._core.compiled import empty, refuse_tensors
from ..spec import Logdet, Scale, choice_index

# Largest number of values per token that the kernels take.
MAX_TOKEN_DIM = 8192
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refuse_width(x: torch.Tensor) -> str | None:
    """Return why the kernels cannot take tokens of this width, or None."""
    D = x.shape[2]
    return f"tokens of {D} values, it takes up to {MAX_TOKEN_DIM}" if D > MAX_TOKEN_DIM else None


def refuse(x: torch.Tensor, params: torch.Tensor, *others) -> str | None:
    """Return why the kernel cannot run, or None."""
    return refuse_tensors(DTYPES, x=x, params=params) or refuse_width(x)


def native_options(scale: str, soft_clip: float, shift: bool, flip: bool, logdet: str):
    """Return the options as the numbers that the kernels take."""
    return choice_index(scale, Scale), soft_clip, shift, flip, choice_index(logdet, Logdet)


def affine_flow(x, params, scale, soft_clip, shift, flip, logdet) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.affine_flow."""
    x, params = x.contiguous(), params.contiguous()
    z, out = empty(*x.shape, dtype=x.dtype), empty(*(x.shape if logdet == "none" else x.shape[:1]))
    torch.ops.starflow_native.affine_flow(x, params, *native_options(scale, soft_clip, shift, flip, logdet), z, out)
    return z, out


def affine_flow_backward(grads, outputs, x, params, *options) -> list[torch.Tensor]:
    """See reference.affine_flow_backward."""
    grads = [None if grad is None else grad.contiguous() for grad in grads]
    z, x, params = (t.contiguous() for t in (outputs[0], x, params))
    gradients = [empty(*t.shape, dtype=t.dtype) for t in (x, params)]
    torch.ops.starflow_native.affine_flow_backward(*grads, z, x, params, *native_options(*options), *gradients)
    return gradients
