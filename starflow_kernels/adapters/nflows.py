"""Flows of this project as transforms of nflows (pip install nflows)."""

from __future__ import annotations

from typing import Any

import torch
from nflows.transforms import Transform

from .distributions import InvertibleFlow


class TarFlowTransform(Transform):
    """Transform of data to noise, for `nflows.flows.Flow`.

    Args:
        flow: the flow, see `starflow_kernels.adapters.distributions.InvertibleFlow`.
        options: further arguments of `flow.inverse`, such as `solvers`.
    """

    def __init__(self, flow: InvertibleFlow, **options: Any) -> None:
        super().__init__()
        self.flow, self.options = flow, options

    def forward(self, inputs: torch.Tensor, context: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the noise of data, and log|det dz/dx| (B,).

        Args:
            inputs: (B, ...) data.
            context: (B, ...) condition of the flow.
        """
        z, logdet, *_ = self.flow(inputs, context)
        return z, logdet

    def inverse(self, inputs: torch.Tensor, context: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the data of noise, and log|det dx/dz| (B,).

        Args:
            inputs: (B, ...) noise.
            context: (B, ...) condition of the flow.
        """
        found = self.flow.inverse(inputs, context, **self.options)
        return found.x, found.logdet
