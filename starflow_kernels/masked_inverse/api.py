"""Inverse of an autoregressive transform of vectors, whose parameters a masked network computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch

from .._core import compiled, dispatch
from .._core.checks import check_same_dtype, check_tensor
from .._core.torch_private import outside_graphs
from . import native, reference
from .network import Activation, MaskedLayer, Univariate
from .plan import MaskedPlan, form_of

dispatch.register("masked_inverse", "reference", reference.masked_inverse)
compiled.register("masked_inverse", native, backward=False)

__all__ = ["MaskedLayer", "MaskedPlan", "Univariate", "masked_inverse"]


@outside_graphs("masked_inverse reads the weights to find when each unit is ready")
def masked_inverse(
    y: torch.Tensor,
    layers: Sequence[MaskedLayer],
    order: torch.Tensor,
    transform: Univariate,
    *,
    interleaved: bool = True,
    plan: MaskedPlan | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Solve y = f(x; params) for x, where the parameters of a feature depend only on features solved before it.

    This inverts a masked autoregressive flow (arXiv 1705.07057), also with splines (arXiv 1906.04032). The native
    backend computes each hidden unit once, when the inputs that it depends on are solved: the work of one pass of the
    network instead of one per feature.

    Args:
        y: (B, D), float32 or float64; the reference takes any floating dtype.
        layers: masked network with D inputs and D P outputs, where P is `transform.params`; tensors in the dtype of y.
        order: integers (D,), position at which each feature is solved. Features at equal positions, as in a coupling
            transform, are solved together.
        transform: map of one feature.
        interleaved: whether the parameters of feature i are the outputs i P .. (i + 1) P - 1 (Zuko, nflows); else
            parameter p of feature i is output p D + i (Pyro).
        plan: `MaskedPlan` of the same layers, which saves its construction when weights have not changed.
        backend: name of a backend; None takes the first that can run.

    Returns:
        x (B, D) and log|det dx/dy| (B,), without gradients: tensors that need one are read as constants.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: an argument of the wrong shape or value. The native backend also refuses parameters that depend on
            features solved later.

    Equivalent to:
        ```python
        x = torch.zeros_like(y)
        for position in order.unique():
            new, _ = inverse(y, network(x, layers).view(B, D, P), transform)
            x = torch.where(order == position, new, x)
        ```
    """
    _check(y, layers, order, transform)
    if not isinstance(plan, (MaskedPlan, type(None))):
        raise TypeError(f"plan: expected a MaskedPlan, got {type(plan).__name__}")
    if plan is not None and plan.form != form_of(layers, transform, interleaved):
        raise ValueError("plan: it was made for layers, parameters or a layout of another form")
    with torch.no_grad():
        return dispatch.run("masked_inverse", backend, y, layers, order, transform, interleaved, plan)


def _check(y: torch.Tensor, layers: Sequence[MaskedLayer], order: torch.Tensor, transform: Univariate) -> None:
    check_tensor("y", y, ("B", "D"))
    B, D = y.shape
    if not isinstance(transform, Univariate):
        raise TypeError(f"transform: expected a Univariate, got {type(transform).__name__}")
    if not isinstance(order, torch.Tensor) or order.shape != (D,) or order.dtype.is_floating_point:
        raise ValueError(f"order: expected a tensor of {D} integers")
    if isinstance(layers, MaskedLayer) or not isinstance(layers, Sequence):
        raise TypeError(f"layers: expected a sequence of MaskedLayer, got {type(layers).__name__}")
    if not layers:
        raise ValueError("layers: expected at least one")
    widths = [D]
    for i, layer in enumerate(layers):
        name = f"layers[{i}]"
        if not isinstance(layer, MaskedLayer):
            raise TypeError(f"{name}: expected a MaskedLayer, got {type(layer).__name__}")
        check_tensor(f"{name}.weight", layer.weight, ("out", widths[-1]), like=y)
        out = layer.weight.shape[0]
        offset_rows = (B,) if getattr(layer.offset, "ndim", 1) == 2 else ()
        check_tensor(f"{name}.offset", layer.offset, (*offset_rows, out), like=y)
        if layer.scale is not None:
            check_tensor(f"{name}.scale", layer.scale, (B, out), like=y)
        tensors = {"weight": layer.weight, "offset": layer.offset, "scale": layer.scale}
        check_same_dtype("y", {"y": y, **{f"{name}.{key}": value for key, value in tensors.items()}})
        if layer.activation not in get_args(Activation):
            raise ValueError(f"{name}.activation={layer.activation!r}: expected one of {get_args(Activation)}")
        earlier = isinstance(layer.skip, int) and 0 <= layer.skip < i
        if layer.skip is not None and not (earlier and widths[layer.skip + 1] == out):
            raise ValueError(f"{name}.skip={layer.skip!r}: expected the index of an earlier layer of the same width")
        widths.append(out)
    if widths[-1] != D * transform.params:
        raise ValueError(f"layers: expected {D} x {transform.params} outputs, got {widths[-1]}")
