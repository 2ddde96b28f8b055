"""Affine flow transform on the CPU by the kernel of csrc/cpu/affine_flow.cpp."""

from __future__ import annotations

import torch

from .._core.compiled import empty

WIDEST = 8192
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALES, LOGDETS = ("exp", "softplus", "unit"), ("sum", "mean", "none")


def refuse(x: torch.Tensor, params: torch.Tensor, *others) -> str | None:
    """Why the kernel cannot run, or None."""
    if x.device.type != "cpu":
        return f"it runs on the CPU, x is on {x.device}"
    if not (x.dtype in DTYPES and params.dtype in DTYPES):
        return f"x is {x.dtype} and params are {params.dtype}, it takes float32, bfloat16 and float16"
    return f"tokens of {x.shape[2]} values, it takes up to {WIDEST}" if x.shape[2] > WIDEST else None


def refuse_backward(grads, outputs, x, params, *others) -> str | None:
    """The same for the gradient."""
    return refuse(x, params)


def native_options(scale: str, soft_clip: float, shift: bool, flip: bool, logdet: str):
    """The options as the kernels number them."""
    return SCALES.index(scale), soft_clip, shift, flip, LOGDETS.index(logdet)


def affine_flow(x, params, scale, soft_clip, shift, flip, logdet) -> tuple[torch.Tensor, torch.Tensor]:
    """z and the log-determinant."""
    x, params = x.contiguous(), params.contiguous()
    z, out = empty(*x.shape, dtype=x.dtype), empty(*(x.shape if logdet == "none" else x.shape[:1]))
    torch.ops.starflow_native.affine_flow(x, params, *native_options(scale, soft_clip, shift, flip, logdet), z, out)
    return z, out


def affine_flow_backward(grads, outputs, x, params, *options) -> list[torch.Tensor]:
    """Gradients with respect to x and params."""
    grads = [None if grad is None else grad.contiguous() for grad in grads]
    z, x, params = (t.contiguous() for t in (outputs[0], x, params))
    found = [empty(*t.shape, dtype=t.dtype) for t in (x, params)]
    torch.ops.starflow_native.affine_flow_backward(*grads, z, x, params, *native_options(*options), *found)
    return found
