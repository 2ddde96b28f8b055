"""Results of both directions of a flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from starflow_kernels import Inverse, SolveReport


class FlowOutput(NamedTuple):
    """Result of the density direction.

    Attributes:
        z: noise in the layout of the data, such as (B, C, H, W) of images.
        logdet: (B,) log|det dz/dx| in nats.
        latents: (B, T, D) tokens after each block; the last of them are the tokens of z.
    """

    z: torch.Tensor
    logdet: torch.Tensor
    latents: list[torch.Tensor]


class FlowInverse:
    """Result of the sampling direction.

    `logdet` is computed when it is read.

    Args:
        x: data in the layout of the noise.
        solved: result of each block, in the order of `blocks`.
        offset: (B,) log-determinant of what follows the blocks.
    """

    def __init__(self, x: torch.Tensor, solved: Sequence[Inverse], offset: torch.Tensor | None = None) -> None:
        self.x, self.solved, self._offset = x, tuple(solved), offset

    @property
    def logdet(self) -> torch.Tensor:
        """(B,) log|det dx/dz| in nats, float32 or wider."""
        logdet = torch.stack([block.logdet for block in self.solved]).sum(0)
        return logdet if self._offset is None else logdet + self._offset

    @property
    def reports(self) -> list[SolveReport]:
        """Work and accuracy of the solve of each block, in the order of `blocks`."""
        return [block.report for block in self.solved]

    def to(self, *arguments: Any, **options: Any) -> FlowInverse:
        """Return the result with tensors converted as by `torch.Tensor.to`, which hooks of accelerate call."""
        solved = [block.to(*arguments, **options) for block in self.solved]
        offset = None if self._offset is None else self._offset.to(*arguments, **options)
        return FlowInverse(self.x.to(*arguments, **options), solved, offset)


class FlowSample(NamedTuple):
    """Samples and their log density.

    Attributes:
        x: samples in the layout of the data.
        log_prob: (B,) log density in nats.
    """

    x: torch.Tensor
    log_prob: torch.Tensor
