"""Density direction of a block where a gradient is needed, and the gradient of its inverse, by differentiable ops."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .._core import compiled
from .._core.numerics import NORM_EPS
from .._core.registration import call
from ..spec import BlockSpec
from . import network, reference


def block_forward(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    *context: Any,
    dropout: float,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noise and log-determinant of data.

    Args:
        x: tokens in the order of the data.
        weights: weights in the order of `spec.weight_shapes`.
        context: cond, prefix, cos, sin, spec and the convention of the log-determinant.
        dropout: probability of zeroing an element of the residual branches.
        backend: name of the backend of each op; None takes the first that can run.
    """
    return network.compose(
        x,
        weights,
        *context,
        attention=functools.partial(call, "causal_attention", backend=backend),
        head=functools.partial(call, "flow_head", backend=backend),
        linear=_linear(weights[0], backend),
        dropout=dropout,
        fused=_fused_ops(x, backend),
    )


def block_inverse_backward(*args) -> torch.Tensor:
    """See reference.block_inverse_backward."""
    density = functools.partial(block_forward, dropout=0.0, backend=None)
    return reference.block_inverse_backward(*args, density=density)


def _linear(weight: torch.Tensor, backend: str | None) -> Callable:
    """Return the linear layer: the op `linear` where it is faster, else torch's, which autocast affects."""
    plain = backend is not None or weight.device.type != "cpu" or weight.dtype != torch.float32
    if plain or compiled.native_unavailable() or torch.is_autocast_enabled("cpu"):
        return torch.nn.functional.linear
    return functools.partial(call, "linear", backend=None)


def _on_gpu(x: torch.Tensor) -> bool:
    return x.is_cuda


def _fused_ops(x: torch.Tensor, backend: str | None) -> network.FusedOps:
    """Return the operations between the matrix products of a layer: fused ops on a GPU, else plain PyTorch."""
    if not _on_gpu(x):
        return network.FusedOps()

    def add_norm(
        h: torch.Tensor, residual: torch.Tensor | None, w: network.Weights, name: str, spec: BlockSpec
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if spec.norm == "none" or (residual is not None and torch.promote_types(h.dtype, residual.dtype) != h.dtype):
            return network.add_norm(h, residual, w, name, spec)
        options = w[f"{name}.weight"], w.get(f"{name}.bias"), spec.norm, NORM_EPS[spec.norm]
        total, normed = call("residual_norm", h, residual, *options, backend=backend)
        return h if residual is None else total, normed

    def up_gelu(x: torch.Tensor, w: network.Weights, name: str, linear: Callable) -> torch.Tensor:
        return call("bias_gelu", linear(x, w[f"{name}.weight"], None), w.get(f"{name}.bias"), backend=backend)

    return network.FusedOps(add_norm, up_gelu)
