"""Inverse by `masked_inverse`, where the network and the univariate transform of a module are recognized."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from .._core.compiled import native_unavailable
from .._core.torch_private import has_hooks
from ..masked_inverse.api import MaskedLayer, MaskedPlan, Univariate, masked_inverse
from ..masked_inverse.native import DTYPES


class Recognized(NamedTuple):
    """Arguments of `masked_inverse`."""

    layers: list[MaskedLayer]
    transform: Univariate
    interleaved: bool = True


# Of each network, what its plan depends on, and the plan.
_plans: weakref.WeakKeyDictionary[nn.Module, tuple[Any, MaskedPlan | None]] = weakref.WeakKeyDictionary()


def solve_columns(
    network: nn.Module,
    recognize: Callable[[torch.Tensor | None], Recognized | None],
    y: torch.Tensor,
    context: torch.Tensor | None,
    order: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    """Return x (N, D) and log|det dx/dy| (N,), or None where the compiled kernel cannot run.

    Args:
        network: the network, with all its weights and masks.
        recognize: recognize(context) returns the arguments of the op.
        y: (N, D) values.
        context: (N, C), or None.
        order: (D,) place of each value.
    """
    if not can_run(network, y):
        return None, None
    digest = digest_of(network, order)
    found = recognize(context)
    if found is None:
        return None, None
    forms = tuple((each.activation, each.skip, each.offset.ndim, each.scale is None) for each in found.layers)
    state = digest, y.dtype, forms, found.transform
    kept = _plans.get(network)
    if kept is None or kept[0] != state:
        kept = state, _plan(found, order)
        # Another thread may have changed the weights meanwhile.
        if digest_of(network, order) == digest:
            _plans[network] = kept
    if kept[1] is None:
        return None, None
    return masked_inverse(y, found.layers, order, found.transform, interleaved=found.interleaved, plan=kept[1])


def can_run(network: nn.Module, y: torch.Tensor) -> bool:
    """Return whether the compiled kernel takes the values y and the weights of a network."""
    if native_unavailable() or has_hooks(network):
        return False
    tensors = [y, *network.parameters(), *network.buffers()]
    same = all(t.dtype == y.dtype or not t.is_floating_point() for t in tensors)
    # Weights that are no parameters would change unnoticed, and subclasses may have no memory.
    plain = all(type(t) in (torch.Tensor, nn.Parameter) for t in tensors) and not attribute_tensors(network)
    return same and plain and y.dtype in DTYPES and all(t.device.type == "cpu" for t in tensors)


def attribute_tensors(module: nn.Module) -> list[torch.Tensor]:
    """Return the weights and biases in a module that are attributes instead of parameters, as in replicas."""
    values = (vars(part).get(name) for part in module.modules() for name in ("weight", "bias"))
    return [value for value in values if isinstance(value, torch.Tensor)]


def _plan(found: Recognized, order: torch.Tensor) -> MaskedPlan | None:
    try:
        # A plan that is made in inference mode serves later calls too.
        with torch.inference_mode(False):
            return MaskedPlan(found.layers, order, found.transform, found.interleaved)
    except ValueError:
        # A value depends on a later one.
        return None


def planned(network: nn.Module) -> int | None:
    """Return the digest for which the last plan of a network was made, None if its weights changed meanwhile."""
    kept = _plans.get(network)
    return kept and kept[0][0]


def digest_of(network: nn.Module, order: torch.Tensor) -> int:
    """Return a digest of the weights, masks and order; fused optimizers change weights without raising versions."""
    tensors = [t.contiguous() for t in (*network.parameters(), *network.buffers(), order)]
    places = torch.tensor([[t.data_ptr(), t.nbytes] for t in tensors], dtype=torch.int64, device="cpu")
    return torch.ops.starflow_native.fingerprint(places)
