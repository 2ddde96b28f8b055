"""Density direction of a block by smaller ops: where a gradient is needed, and on a GPU. Gradient of its inverse."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .._core import compiled
from .._core.numerics import NORM_EPS
from .._core.registration import call
from .._triton import runtime
from ..spec import BlockSpec
from . import layer, network, reference


def block_forward(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    *context: Any,
    dropout: float,
    backend: str | None,
    run_layer: network.RunLayer | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noise and log-determinant of data.

    Args:
        x: tokens in the order of the data.
        weights: weights in the order of `spec.weight_shapes`.
        context: cond, prefix, cos, sin, spec and the convention of the log-determinant.
        dropout: probability of zeroing an element of the residual branches.
        backend: name of the backend of each op; None takes the first that can run.
        run_layer: calls each layer with its weights, which are then None in `weights`.
    """
    return network.compose(
        x,
        weights,
        *context,
        head=functools.partial(call, "flow_head", backend=backend),
        dropout=dropout,
        run_layer=run_layer,
        **_operations(x, weights, context[4], backend),
    )


def block_forward_without_gradient(
    x, weights, cond, prefix, cos, sin, spec_json: str, logdet: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.block_forward."""
    context = cond, prefix, cos, sin, BlockSpec.from_json(spec_json), logdet
    return block_forward(x, weights, *context, dropout=0.0, backend=None)


def block_params(x, weights, *context) -> torch.Tensor:
    """See reference.block_params."""
    return reference.block_params(
        x, weights, *context, **_operations(x, weights, BlockSpec.from_json(context[-1]), None)
    )


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


def _operations(x: torch.Tensor, weights: list[torch.Tensor], spec: BlockSpec, backend: str | None) -> dict[str, Any]:
    """Return the keyword arguments of `network.hidden_states` that make it run on ops."""
    return {
        "attention": functools.partial(call, "causal_attention", backend=backend),
        "linear": _linear(weights[0], backend),
        "fused": _fused_ops(x, weights, spec, backend),
    }


def _on_native(weight: torch.Tensor, backend: str | None) -> bool:
    """Return whether the CPU kernels are faster than torch's operations, which autocast affects."""
    plain = backend is not None or weight.device.type != "cpu" or weight.dtype != torch.float32
    return not (plain or compiled.native_unavailable() or torch.is_autocast_enabled("cpu"))


def _linear(weight: torch.Tensor, backend: str | None) -> Callable:
    """Return the linear layer: the op `linear` where it is faster, else torch's."""
    return functools.partial(call, "linear", backend=None) if _on_native(weight, backend) else F.linear


def _on_gpu(x: torch.Tensor) -> bool:
    return x.is_cuda


def _layers(
    h: torch.Tensor,
    w: network.Weights,
    spec: BlockSpec,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    dropout: float,
    run_layer: network.RunLayer | None,
) -> torch.Tensor:
    """Apply the transformer layers, each by one op."""
    spec_json = spec.to_json()
    for i in range(spec.layers):
        step = functools.partial(_layer, cos=cos, sin=sin, dropout=dropout, spec_json=spec_json)
        h = step(w, h, f"layers.{i}.") if run_layer is None else run_layer(i, step, h)
    return h


def _layer(
    w: network.Weights,
    h: torch.Tensor,
    prefix: str = "",
    *,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    dropout: float,
    spec_json: str,
) -> torch.Tensor:
    """Apply a layer, whose names in `w` begin with the prefix."""
    # torch draws the same factors in F.dropout.
    drops = [torch.empty_like(h).bernoulli_(1 - dropout).div_(1 - dropout) if dropout else None for _ in range(2)]
    weights = (w.get(f"{prefix}{name}") for name in layer.NAMES)
    return call("block_layer", h, *weights, cos, sin, *drops, spec_json, backend=None)[0]


def _fused_ops(x: torch.Tensor, weights: list[torch.Tensor], spec: BlockSpec, backend: str | None) -> network.FusedOps:
    """Return the fused ops: what is between the products of a layer on a GPU, a trained layer on the CPU."""
    if not _on_gpu(x):
        trained = _on_native(weights[0], backend) and any(w is not None and w.requires_grad for w in weights)
        return network.FusedOps(layers=_layers if trained and layer.supports(spec) else None)

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
