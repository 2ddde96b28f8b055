"""Flow head on the CPU, by the kernels in csrc/cpu/flow_head.cpp; narrower tensors are converted to float32."""

from __future__ import annotations

import torch

from .._core.compiled import empty, refuse_tensors
from ..affine_flow.native import DTYPES, native_options, refuse_width


def refuse(x: torch.Tensor, h, weight, bias, norm_weight, *others) -> str | None:
    """Return why the kernel cannot run, or None."""
    tensors = {"x": x, "h": h, "weight": weight, "bias": bias, "norm_weight": norm_weight}
    return refuse_tensors(DTYPES, **tensors) or refuse_width(x)


def _float32(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if tensor is None else tensor.to(torch.float32).contiguous() for tensor in tensors]


def flow_head(x, h, weight, bias, norm_weight, *options) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.flow_head."""
    inputs = _float32(x, h, weight, bias, norm_weight)
    z, out = empty(*x.shape), empty(*(x.shape if options[-1] == "none" else x.shape[:1]))
    torch.ops.starflow_native.flow_head(*inputs, *native_options(*options), z, out)
    return z.to(x.dtype), out


def flow_head_backward(grads, outputs, x, h, weight, bias, norm_weight, *options) -> list[torch.Tensor]:
    """See reference.flow_head_backward."""
    tensors = x, h, weight, bias, norm_weight
    inputs = _float32(*tensors)
    gradients = [None if tensor is None else empty(*tensor.shape) for tensor in inputs]
    grads_and_z = _float32(*grads, outputs[0])
    torch.ops.starflow_native.flow_head_backward(*grads_and_z, *inputs, *native_options(*options), *gradients)
    return [grad.to(like.dtype) for grad, like in zip(gradients, tensors) if like is not None]
