"""Flows of this project as flows of normflows (pip install normflows)."""

from __future__ import annotations

from typing import Any

import torch
from normflows.flows import Flow

from .distributions import InvertibleFlow


class TarFlow(Flow):
    """Flow from noise to data, as the flows of normflows are, for `NormalizingFlow` and `ConditionalNormalizingFlow`.

    Args:
        flow: the flow, see `starflow_kernels.adapters.distributions.InvertibleFlow`.
        options: further arguments of `flow.inverse`, such as `solvers`.
    """

    def __init__(self, flow: InvertibleFlow, **options: Any) -> None:
        super().__init__()
        self.flow, self.options = flow, options

    def forward(self, z: torch.Tensor, context: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the data of noise, and log|det dx/dz| (B,).

        Args:
            z: (B, ...) noise.
            context: (B, ...) condition of the flow.
        """
        found = self.flow.inverse(z, context, **self.options)
        return found.x, found.logdet

    def inverse(self, z: torch.Tensor, context: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the noise of data, and log|det dz/dx| (B,).

        Args:
            z: (B, ...) data.
            context: (B, ...) condition of the flow.
        """
        noise, logdet, *_ = self.flow(z, context)
        return noise, logdet
