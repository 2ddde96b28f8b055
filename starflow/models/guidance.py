"""Guidance of sampling, and its weight at each token."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from starflow_kernels.spec import GuidanceRule

from ..errors import ConfigError
from ..settings import check_types


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Guidance of sampling toward a class or prompt.

    Args:
        weight: guidance weight >= 0; 0 samples without guidance.
        rule: "tarflow", "starflow" or "itarflow", see `starflow_kernels.affine_flow_inverse`.
        annealed: let the weight grow linearly over the n transformed tokens of a block, from weight / n to weight.
        temperature: attention temperature > 0 of the branch without a condition. A value other than 1 guides a model
            that has no condition.

    Raises:
        ConfigError: A value is out of range.
    """

    weight: float = 0.0
    rule: GuidanceRule = "tarflow"
    annealed: bool = False
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 <= self.weight < math.inf:
            raise ConfigError(f"weight={self.weight}: expected a finite guidance weight >= 0")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature={self.temperature}: expected a finite attention temperature > 0")

    @property
    def tempered(self) -> bool:
        """Whether an attention temperature acts."""
        return bool(self.weight) and self.temperature != 1

    def weights(self, tokens: int, start: bool, device: torch.device) -> torch.Tensor:
        """Weight of each token of a block.

        Args:
            tokens: number of tokens T.
            start: whether the block has a start token. Without one, token 0 is not transformed.
            device: device of the result.

        Returns:
            (T,) float64 weights in the block's own order.
        """
        steps = torch.arange(tokens, dtype=torch.float64, device="cpu") + int(start)
        ramp = steps / max(tokens - 1 + int(start), 1) if self.annealed else torch.ones_like(steps)
        return (self.weight * ramp).to(device)

    def options(self, tokens: int, start: bool, device: torch.device) -> dict[str, Any]:
        """Arguments of `starflow_kernels.block_inverse`; the parameters are those of `weights`."""
        return {"guidance": self.weights(tokens, start, device), "rule": self.rule, "temperature": self.temperature}
