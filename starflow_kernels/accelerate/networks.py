"""Structure of the masked networks of other libraries."""

from __future__ import annotations

import torch
from torch import nn


def masked_dependences(network: nn.Module, features: int) -> torch.Tensor:
    """Return (D, D) whether value i depends on value j by a chain of masked layers.

    Args:
        network: network whose masked layers have a buffer `mask` (out, in), in the order in which they are applied. The
            values are the first inputs, and the outputs are D groups, one per value.
        features: D.
    """
    first, *others = [layer.mask for layer in network.modules() if hasattr(layer, "mask")]
    reach = first[:, :features].float()
    for mask in others:
        reach = (mask.float() @ reach > 0).float()
    return reach.unflatten(0, (features, -1)).amax(1) > 0


def places(depends: torch.Tensor) -> torch.Tensor:
    """Return the place (D,) of each value in an order in which none depends on a later one, from depends (D, D)."""
    place = torch.zeros(len(depends), dtype=torch.int64, device=depends.device)
    while True:
        later = torch.where(depends, place + 1, 0).amax(1)
        if torch.equal(later, place):
            return place
        place = later
