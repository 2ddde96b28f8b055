"""Plan of masked_inverse: when each hidden unit is ready, and the weights in that order."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..spec import choice_index
from .network import Activation, MaskedLayer, Univariate


class MaskedPlan:
    """Copies of the weights and of the offsets per unit, sorted by when each unit is ready.

    A plan is good for all calls with the same weights and offsets per unit; only what a layer has per sample may
    differ between calls.

    Args:
        layers: the network.
        order: integers (D,), position at which each input is solved; equal positions are solved together.
        transform: map of one feature.
        interleaved: layout of the network's outputs, see `masked_inverse`.

    Raises:
        ValueError: a parameter that depends on an input which is solved at the same position or later.
    """

    def __init__(self, layers: Sequence[MaskedLayer], order: torch.Tensor, transform: Univariate, interleaved: bool):
        self.form = form_of(layers, transform, interleaved)
        # A plan made in inference mode is good outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self._build(layers, order.cpu(), transform.params, interleaved)

    def _build(self, layers: Sequence[MaskedLayer], order: torch.Tensor, P: int, interleaved: bool) -> None:
        D = len(order)
        rank = torch.unique(order, return_inverse=True)[1]
        steps = int(rank.max()) + 1
        every = torch.arange(steps + 1, dtype=torch.int64, device="cpu")
        # A unit of level r needs the inputs of the positions before r.
        columns = torch.argsort(rank, stable=True)
        level, places = rank + 1, [columns]
        numbers = [D, steps, P, len(layers), *columns.tolist(), *_below(rank, every).tolist()]
        weights, offsets, levels, width = [], [], [], 0
        outputs = torch.arange(D * P, dtype=torch.int64, device="cpu")
        outputs = outputs.view(D, P) if interleaved else outputs.view(P, D).T
        for i, layer in enumerate(layers):
            weight = layer.weight.detach()
            level = torch.where(weight.cpu() != 0, level, 0).amax(1)
            if layer.skip is not None:
                level = torch.maximum(level, levels[layer.skip])
            if i + 1 < len(layers):
                rows = torch.argsort(level, stable=True)
                ready = _below(level, every[1:])
            else:
                if (level[outputs] > rank[:, None]).any():
                    bad = int((level[outputs] > rank[:, None]).any(1).nonzero()[0])
                    raise ValueError(f"layers: the parameters of feature {bad} depend on inputs that are solved later")
                rows = outputs[columns].flatten()
                ready = _below(rank, every[1:]) * P
            skips = [0] * len(rows)
            if layer.skip is not None:
                skips = torch.argsort(places[layer.skip + 1])[rows].tolist()
            columns_of = [-1, -1]
            for j, per_sample in enumerate((layer.offset.ndim == 2, layer.scale is not None)):
                if per_sample:
                    columns_of[j], width = width, width + len(rows)
            numbers += [len(rows), choice_index(layer.activation, Activation), -1 if layer.skip is None else layer.skip]
            numbers += [*columns_of, *rows.tolist(), *skips, *ready.tolist()]
            weights.append(weight[rows][:, places[-1]].flatten())
            shared = layer.offset.ndim == 1
            offsets.append(layer.offset.detach()[rows] if shared else weight.new_zeros(len(rows)))
            levels.append(level)
            places.append(rows)
        self.numbers = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        self.weights, self.offsets = torch.cat(weights), torch.cat(offsets)


def form_of(layers: Sequence[MaskedLayer], transform: Univariate, interleaved: bool) -> tuple:
    """Return what a plan has in common with the calls that may use it."""
    per_layer = [
        (layer.weight.shape, layer.weight.dtype, layer.offset.ndim, layer.activation, layer.scale is None, layer.skip)
        for layer in layers
    ]
    return transform.params, interleaved, per_layer


def _below(values: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    """Return how many of `values` are below each limit."""
    return (values[:, None] < limits).sum(0)
