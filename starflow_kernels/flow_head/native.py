"""Flow head on the CPU by the kernels of csrc/cpu/flow_head.cpp."""

from __future__ import annotations

import torch

from .._core.compiled import empty
from ..affine_flow.native import WIDEST, native_options


def refuse(x: torch.Tensor, h, weight, bias, norm_weight, *others) -> str | None:
    """Why the kernel cannot run, or None."""
    if x.device.type != "cpu":
        return f"it runs on the CPU, x is on {x.device}"
    for name, tensor in (("x", x), ("h", h), ("weight", weight), ("bias", bias), ("norm_weight", norm_weight)):
        if tensor is not None and tensor.dtype != torch.float32:
            return f"{name} is {tensor.dtype}, it takes float32"
    return f"tokens of {x.shape[2]} values, it takes up to {WIDEST}" if x.shape[2] > WIDEST else None


def refuse_backward(grads, outputs, *args) -> str | None:
    """The same for the gradient."""
    return refuse(*args)


def _contiguous(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def flow_head(x, h, weight, bias, norm_weight, *options) -> tuple[torch.Tensor, torch.Tensor]:
    """z and the log-determinant."""
    inputs = _contiguous(x, h, weight, bias, norm_weight)
    z, out = empty(*x.shape), empty(*(x.shape if options[-1] == "none" else x.shape[:1]))
    torch.ops.starflow_native.flow_head(*inputs, *native_options(*options), z, out)
    return z, out


def flow_head_backward(grads, outputs, x, h, weight, bias, norm_weight, *options) -> list[torch.Tensor]:
    """Gradients with respect to x, h, weight, bias and norm_weight; the raw parameters are computed anew."""
    inputs = _contiguous(x, h, weight, bias, norm_weight)
    found = [None if tensor is None else empty(*tensor.shape) for tensor in inputs]
    grads_and_z = _contiguous(*grads, outputs[0])
    torch.ops.starflow_native.flow_head_backward(*grads_and_z, *inputs, *native_options(*options), *found)
    return [tensor for tensor in found if tensor is not None]
