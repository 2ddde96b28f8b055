"""Linear layer on the CPU, by the kernels in csrc/cpu/linear.cpp; torch's BLAS does not use AVX-512 on some CPUs."""

from __future__ import annotations

import torch

from .._core.compiled import empty, refuse_tensors


def refuse(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    """Return why the kernel cannot run, or None."""
    if reason := refuse_tensors((torch.float32,), x=x):
        return reason
    return None if x.numel() and weight.numel() else "there is nothing to multiply"


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(0, 1).contiguous()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """See reference.linear."""
    y = empty(*x.shape[:-1], weight.shape[0])
    linear_into(y, x, weight, bias)
    return y


def linear_into(
    out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, sigmoid: bool = False
) -> None:
    """Write a linear layer, without gradients.

    Args:
        out: (B, T, out) contiguous, or some channels of a tensor that is; float32.
        x: as in `linear`, and so the next arguments.
        weight: weight.
        bias: bias.
        sigmoid: whether to write the sigmoid of the result.
    """
    bias = None if bias is None else bias.contiguous()
    across = weight.T.is_contiguous() and not weight.is_contiguous()
    weight = weight.T if across else weight.contiguous()
    torch.ops.starflow_native.linear(_rows(x), weight, across, bias, sigmoid, out.view(-1, out.shape[-1]))


def linear_backward(grads, outputs, x, weight, bias) -> list[torch.Tensor]:
    """See reference.linear_backward."""
    (grad,) = grads
    gradients = [None if t is None else empty(*t.shape) for t in (x, weight, bias)]
    grad_x, *others = gradients
    torch.ops.starflow_native.linear_backward(_rows(grad), _rows(x), weight.contiguous(), grad_x.flatten(0, 1), *others)
    return [t for t in gradients if t is not None]
