"""Autoregressive transforms of nflows, with any elementwise transform."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .._core.torch_private import outside_graphs
from ..masked_inverse.network import Univariate
from .autoregressive import Autoregressive, applies
from .columns import Recognized
from .networks import made_layers
from .swap import Accelerated, loaded, original_class


def _networks() -> tuple[type, ...]:
    return loaded("nflows.transforms.made", "MADE"), loaded("normflows.nets.made", "MADE")


class FastInverse(Autoregressive):
    """Inverse of `nflows.transforms.autoregressive.AutoregressiveTransform`, and of its copy in normflows."""

    def sizes(self) -> tuple[int, int]:
        """Return the number of values and that of the context."""
        net = self.autoregressive_net
        return net.initial_layer.in_features, net.context_layer.in_features if hasattr(net, "context_layer") else 0

    def on_unit_interval(self) -> bool:
        """Return whether values are from 0 to 1, as those of splines without tails are."""
        return hasattr(self, "num_bins") and getattr(self, "tails", None) is None

    def places(self) -> torch.Tensor:
        """Return the place (D,) of each value in the order in which they depend on each other."""
        net = self.autoregressive_net
        return net.final_layer.degrees.unflatten(0, (net.initial_layer.in_features, -1))[:, 0] - 1

    def network(self) -> nn.Module:
        """Return the network."""
        return self.autoregressive_net

    def recognized(self, context: torch.Tensor | None) -> Recognized | None:
        """Return the layers and the univariate transform, or None."""
        transform = _univariate(self)
        layers = made_layers(self.autoregressive_net, context) if transform else None
        return Recognized(layers, transform) if layers and transform else None

    def step(self, x: torch.Tensor, y: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        """Return x of y by the parameters that belong to another x."""
        return self.with_logdet(x, y, context)[0]

    def with_logdet(
        self, x: torch.Tensor, y: torch.Tensor, context: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x of y, and its log-determinant, by the parameters that belong to another x."""
        return self._elementwise_inverse(y, self.autoregressive_net(x, context))

    @staticmethod
    def inverse_rows(module: nn.Module, y: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        """Return x of y."""
        return torch.cat([value.reshape(len(y), -1) for value in module.inverse(y, context)], 1)

    @outside_graphs("values decide how many passes follow")
    def inverse(self, inputs: torch.Tensor, context: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x (N, D) of inputs (N, D) and a context (N, C), and the log-determinant (N,)."""
        known = isinstance(self.autoregressive_net, _networks()) and inputs.ndim == 2
        of_rows = context is None or (context.ndim == 2 and len(context) == len(inputs))
        if not (known and of_rows and applies(self, inputs, context)):
            return super().inverse(inputs, context)
        x, logdet = self.solve(inputs, context)
        return (x, logdet) if logdet is not None else self.with_logdet(x, inputs, context)

    def loop(self, y: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        """Return x of y by the library's own loop."""
        return super().inverse(y, context)[0]


def candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, type[Accelerated] | str]]:
    """Return name, module, and fast class or reason of the transforms in a model."""
    return autoregressive(
        model,
        loaded("nflows.transforms.autoregressive", "AutoregressiveTransform"),
        loaded("nflows.transforms.made", "MADE"),
    )


def autoregressive(
    model: nn.Module, transform: type, made: type
) -> Iterator[tuple[str, nn.Module, type[Accelerated] | str]]:
    """Return what `candidates` returns, for the two classes of a library that copied those of nflows."""
    for name, module in model.named_modules():
        if isinstance(module, transform):
            yield name, module, _fast(module, transform, made)


def _fast(module: nn.Module, transform: type, made: type) -> type[Accelerated] | str:
    if original_class(module).inverse is not transform.inverse:
        return "its class has an inverse of its own"
    return FastInverse if isinstance(module.autoregressive_net, made) else "its network is no MADE of the library"


def _univariate(module: Any) -> Univariate | None:
    """Return the univariate transform of a module, or None if `masked_inverse` has no such."""
    kind, autoregressive = original_class(module), "nflows.transforms.autoregressive"
    if kind is loaded(autoregressive, "MaskedAffineAutoregressiveTransform"):
        return Univariate("affine_softplus", scale_first=True, epsilon=vars(module)["_epsilon"])
    if kind is loaded("normflows.flows.affine.autoregressive", "MaskedAffineAutoregressive"):
        return Univariate("affine_sigmoid", scale_first=True)
    splines = (
        loaded(autoregressive, "MaskedPiecewiseRationalQuadraticAutoregressiveTransform"),
        loaded("normflows.flows.neural_spline.autoregressive", "MaskedPiecewiseRationalQuadraticAutoregressive"),
    )
    if kind not in splines or module.tails != "linear" or isinstance(module.tail_bound, torch.Tensor):
        return None
    return Univariate(
        "spline_softmax",
        bins=module.num_bins,
        bound=float(module.tail_bound),
        min_width=module.min_bin_width,
        min_height=module.min_bin_height,
        min_derivative=module.min_derivative,
        divisor=math.sqrt(getattr(module.autoregressive_net, "hidden_features", 1)),
    )
