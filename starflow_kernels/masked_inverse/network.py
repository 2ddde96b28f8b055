"""Masked network and univariate transform of `masked_inverse`."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple

import torch

from ..spec import check_choice

Activation = Literal[
    "identity",
    "relu",
    "leaky_relu",
    "elu",
    "tanh",
    "sigmoid",
    "silu",
    "gelu",
    "gelu_tanh",
    "softplus",
]
Kind = Literal[
    "affine_soft_clip",
    "affine_softplus",
    "affine_sigmoid",
    "affine_clamp",
    "affine_convex",
    "spline_soft_clip",
    "spline_softmax",
]


class MaskedLayer(NamedTuple):
    """One layer of a masked network: (weight @ activation(input) + offset) * scale + output of layer `skip`.

    Args:
        weight: (out, in), with the mask applied.
        offset: (out,), or (B, out) for an offset per sample.
        activation: function that is applied to the input. leaky_relu has the slope 0.01, elu the scale 1.
        scale: (B, out) factors of the output, or None.
        skip: index of an earlier layer of the same width whose output is added, or None.
    """

    weight: torch.Tensor
    offset: torch.Tensor
    activation: Activation = "identity"
    scale: torch.Tensor | None = None
    skip: int | None = None


@dataclasses.dataclass(frozen=True)
class Univariate:
    """Map from x to y of one feature, and how its raw parameters are read.

    An affine map y = s x + m has the parameters (m, a), or (a, m) if `scale_first`:

    | kind | s |
    |---|---|
    | "affine_soft_clip" (Zuko) | exp(a / (1 + abs(a / log(slope)))) |
    | "affine_softplus" (nflows) | softplus(a) + epsilon |
    | "affine_sigmoid" (normflows) | sigmoid(a + bias) + epsilon |
    | "affine_clamp" (Pyro) | exp(clamp(a, low, high)) |
    | "affine_convex" (Pyro, stable) | sigmoid(a + bias), and y = s x + (1 - s) m |

    A rational-quadratic spline has `bins` widths, `bins` heights and `bins - 1` derivatives at the inner knots, and is
    the identity outside of [-bound, bound]. "spline_soft_clip" (Zuko) clips them by `slope`; "spline_softmax" (nflows,
    normflows) divides raw widths and heights by `divisor` and has minima of widths, heights and derivatives.
    """

    kind: Kind
    scale_first: bool = False
    slope: float = 1e-3
    epsilon: float = 1e-3
    bias: float = 2.0
    low: float = -5.0
    high: float = 3.0
    bins: int = 8
    bound: float = 5.0
    min_width: float = 1e-3
    min_height: float = 1e-3
    min_derivative: float = 1e-3
    divisor: float = 1.0

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, Kind)
        if self.is_spline and self.bins < 1:
            raise ValueError(f"bins={self.bins}: expected at least 1")
        if not 0 < self.slope < 1:
            raise ValueError(f"slope={self.slope}: expected a number between 0 and 1")

    @property
    def is_spline(self) -> bool:
        """Whether the map is a spline."""
        return self.kind.startswith("spline")

    @property
    def params(self) -> int:
        """Raw parameters per feature."""
        return 3 * self.bins - 1 if self.is_spline else 2

    @property
    def constants(self) -> list[float]:
        """Constants of the map in the order of the compiled kernel."""
        if self.is_spline:
            minima = self.min_width, self.min_height, self.min_derivative
            return [self.bound, 1 / math.log(self.slope), *minima, 1 / self.divisor]
        return [float(self.scale_first), 1 / math.log(self.slope), self.epsilon, self.bias, self.low, self.high]
