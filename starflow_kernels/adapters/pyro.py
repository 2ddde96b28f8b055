"""Flows of this project as conditional transforms of Pyro (pip install pyro-ppl)."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions.conditional import ConditionalTransformModule
from torch.distributions import Transform

from .distributions import FlowTransform, InvertibleFlow


class ConditionalTarFlow(ConditionalTransformModule):
    """Conditional transform of noise to data, as those of Pyro are, for `ConditionalTransformedDistribution`.

    Without a condition, `FlowTransform(flow).inv` is a transform of Pyro as it is.

    Args:
        flow: the flow, see `starflow_kernels.adapters.distributions.InvertibleFlow`.
        options: further arguments of `flow.inverse`, such as `solvers`.
    """

    def __init__(self, flow: InvertibleFlow, **options: Any) -> None:
        super().__init__()
        self.flow, self.options = flow, options

    def condition(self, context: torch.Tensor) -> Transform:
        """Return the transform under a condition, with a cache of one pair, as Pyro's own.

        Args:
            context: (*batch, ...) condition of the flow.
        """
        return FlowTransform(self.flow, context, cache_size=1, **self.options).inv
