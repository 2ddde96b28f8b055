"""Flow head on the CPU, by the kernels in csrc/cpu/flow_head.cpp."""

from __future__ import annotations

import torch

from .._core.compiled import empty, refuse_tensors
from ..affine_flow.native import native_options, refuse_width


def refuse(x: torch.Tensor, h, weight, bias, norm_weight, *others) -> str | None:
    """Return why the kernel cannot run, or None."""
    tensors = {"x": x, "h": h, "weight": weight, "bias": bias, "norm_weight": norm_weight}
    return refuse_tensors((torch.float32,), **tensors) or refuse_width(x)


def _contiguous(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def flow_head(x, h, weight, bias, norm_weight, *options) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.flow_head."""
    inputs = _contiguous(x, h, weight, bias, norm_weight)
    z, out = empty(*x.shape), empty(*(x.shape if options[-1] == "none" else x.shape[:1]))
    torch.ops.starflow_native.flow_head(*inputs, *native_options(*options), z, out)
    return z, out


def flow_head_backward(grads, outputs, x, h, weight, bias, norm_weight, *options) -> list[torch.Tensor]:
    """See reference.flow_head_backward."""
    inputs = _contiguous(x, h, weight, bias, norm_weight)
    gradients = [None if tensor is None else empty(*tensor.shape) for tensor in inputs]
    grads_and_z = _contiguous(*grads, outputs[0])
    torch.ops.starflow_native.flow_head_backward(*grads_and_z, *inputs, *native_options(*options), *gradients)
    return [tensor for tensor in gradients if tensor is not None]
