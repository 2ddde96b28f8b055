"""Flows of this project among those of zuko (pip install zuko)."""

from __future__ import annotations

from typing import Any

import torch
import zuko
from torch.distributions import Distribution

from .distributions import FlowTransform, InvertibleFlow


class ZukoTransform(FlowTransform):
    """Transform of data to noise, with the shapes that zuko expects."""

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """Return the shape of a sample, which zuko asks for without batch dimensions."""
        return shape

    inverse_shape = forward_shape


class LazyFlowTransform(zuko.lazy.LazyTransform):
    """Lazy transform of data to noise, alone or in a list with other transforms of zuko.

    Args:
        flow: the flow, see `starflow_kernels.adapters.distributions.InvertibleFlow`.
        options: further arguments of `flow.inverse`, such as `solvers`.
    """

    def __init__(self, flow: InvertibleFlow, **options: Any) -> None:
        super().__init__()
        self.flow, self.options = flow, options

    def forward(self, c: torch.Tensor | None = None) -> ZukoTransform:
        """Return the transform under a context.

        Args:
            c: (*batch, ...) condition of the flow.
        """
        return ZukoTransform(self.flow, c, **self.options)


class LazyPrior(zuko.lazy.LazyDistribution):
    """Lazy distribution of the noise of a flow.

    Args:
        flow: the flow.
    """

    def __init__(self, flow: InvertibleFlow) -> None:
        super().__init__()
        # The flow is a module of the transform alone, so that its weights are saved once.
        self.prior = flow.prior

    def forward(self, c: torch.Tensor | None = None) -> Distribution:
        """Return the distribution.

        Args:
            c: a context, which is ignored.
        """
        return self.prior()


class TarFlow(zuko.lazy.Flow):
    """Flow of zuko that consists of one flow of this project: `TarFlow(flow)(c).log_prob(x)`.

    Args:
        flow: as in `LazyFlowTransform`.
        options: as in `LazyFlowTransform`.
    """

    def __init__(self, flow: InvertibleFlow, **options: Any) -> None:
        super().__init__(LazyFlowTransform(flow, **options), LazyPrior(flow))

    def forward(self, c: torch.Tensor | None = None) -> zuko.distributions.NormalizingFlow:
        """Return the distribution of the data under a context.

        Args:
            c: (*batch, ...) condition of the flow, of any number of dimensions per sample.
        """
        transform = self.transform(c)
        return zuko.distributions.NormalizingFlow(transform, self.base(c).expand(transform.batch_shape))
