"""Density direction of a block by smaller ops: where a gradient is needed, and on a GPU. Gradient of its inverse."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .._core import compiled
from .._core.numerics import NORM_EPS
from .._core.registration import call
from .._triton import runtime
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
        head=functools.partial(call, "flow_head", backend=backend),
        dropout=dropout,
        **_operations(x, weights, backend),
    )


def block_forward_without_gradient(
    x, weights, cond, prefix, cos, sin, spec_json: str, logdet: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.block_forward."""
    context = cond, prefix, cos, sin, BlockSpec.from_json(spec_json), logdet
    return block_forward(x, weights, *context, dropout=0.0, backend=None)


def block_params(x, weights, *context) -> torch.Tensor:
    """See reference.block_params."""
    return reference.block_params(x, weights, *context, **_operations(x, weights, None))


def unavailable() -> str | None:
    """Return why this machine has no GPU for the ops, or None."""
    return None if runtime.interpreted() or torch.cuda.device_count() else "torch sees no GPU"


def refuse(x, *args) -> str | None:
    """Return why a block is not composed of smaller ops where no gradient is needed, or None."""
    return None if _on_gpu(x) else f"without a gradient it runs on CUDA, not on {x.device.type}"


def block_inverse_backward(*args) -> torch.Tensor:
    """See reference.block_inverse_backward."""
    density = functools.partial(block_forward, dropout=0.0, backend=None)
    return reference.block_inverse_backward(*args, density=density)


def _operations(x: torch.Tensor, weights: list[torch.Tensor], backend: str | None) -> dict[str, Any]:
    """Return the keyword arguments of `network.hidden_states` that make it run on ops."""
    return {
        "attention": functools.partial(call, "causal_attention", backend=backend),
        "linear": _linear(weights[0], backend),
        "fused": _fused_ops(x, backend),
    }


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
