"""Masked autoregressive transforms of zuko, with any univariate transform."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import nn

from .._core.torch_private import outside_graphs
from .autoregressive import Autoregressive, applies, solve
from .networks import masked_dependences, places
from .swap import Accelerated, loaded, original_class


class FastTransform(Autoregressive):
    """Inverse of `zuko.flows.MaskedAutoregressiveTransform`."""

    def sizes(self) -> tuple[int, int]:
        """Return the number of values and that of the context."""
        features = self.hyper.out_features // self.total
        return features, self.hyper.in_features - features

    def places(self) -> torch.Tensor:
        """Return the place (D,) of each value in the order in which they depend on each other."""
        if self.order is not None:
            return self.order
        return places(masked_dependences(self.hyper, self.sizes()[0]))

    def step(self, x: torch.Tensor, y: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        """Return x of y by the parameters that belong to another x."""
        return self.meta(context, x).inv(y)

    @staticmethod
    def inverse_rows(module: nn.Module, y: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        """Return x of y."""
        return module(context).inv(y)

    def forward(self, c: torch.Tensor | None = None):
        """Return the transform under a context (*, C)."""
        transform = super().forward(c)
        vars(transform)["_inverse"] = functools.partial(self.solve_rows, c=c)
        return transform

    @outside_graphs("values decide how many passes follow")
    def solve_rows(self, y: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
        """Return x (*, D) of y (*, D) under a context (*, C)."""

        def original(y: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
            return super(FastTransform, self).forward(c).inv(y)

        if not applies(self, y):
            return original(y, c)
        batch = y.shape[:-1] if c is None else torch.broadcast_shapes(y.shape[:-1], c.shape[:-1])
        y, c = (None if t is None else t.expand(*batch, -1).reshape(-1, t.shape[-1]) for t in (y, c))
        x = solve(self.step, y, c, self.places(), self.tol, original, self.parameters())
        return x.reshape(*batch, -1)


def candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, type[Accelerated] | str]]:
    """Return name, module, and fast class or reason of the transforms in a model."""
    transform = loaded("zuko.flows.autoregressive", "MaskedAutoregressiveTransform")
    for name, module in model.named_modules():
        if isinstance(module, transform):
            yield name, module, _fast(module, transform)


def _fast(module: nn.Module, transform: type) -> type[Accelerated] | str:
    if original_class(module).forward is not transform.forward:
        return "its class has a forward of its own"
    return FastTransform if module.passes > 2 else f"its inverse takes {module.passes} passes"
