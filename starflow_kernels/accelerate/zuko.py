"""Masked autoregressive transforms of zuko, with any univariate transform."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .._core.torch_private import outside_graphs, version
from ..masked_inverse.network import Univariate
from .autoregressive import Autoregressive, applies
from .columns import Recognized, digest_of, planned
from .networks import masked_dependences, places, zuko_layers
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

    def network(self) -> nn.Module:
        """Return all that has weights."""
        return self

    def recognized(self, context: torch.Tensor | None) -> Recognized | None:
        """Return the layers and the univariate transform, or None."""
        transform = _univariate(self)
        layers = zuko_layers(self.hyper, self.sizes()[0], context) if transform else None
        return Recognized(layers, transform) if layers and transform else None

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
        inverse = _Inverse(self, c)
        vars(transform).update(_inverse=inverse, log_abs_det_jacobian=inverse.log_abs_det_jacobian)
        return transform

    @outside_graphs("values decide how many passes follow")
    def solve_rows(self, y: torch.Tensor, c: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return x (*, D) of y (*, D) under a context (*, C), and its log-determinant (*) if `solve` has it."""
        if not isinstance(self.hyper, loaded("zuko.nn", "MaskedMLP")) or not applies(self, y, c):
            return self.loop(y, c), None
        batch = y.shape[:-1] if c is None else torch.broadcast_shapes(y.shape[:-1], c.shape[:-1])
        y, c = (None if t is None else t.expand(*batch, -1).reshape(-1, t.shape[-1]) for t in (y, c))
        x, logdet = self.solve(y, c)
        return x.reshape(*batch, -1), None if logdet is None else logdet.reshape(batch)

    def loop(self, y: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        """Return x of y by the library's own loop."""
        return super().forward(context).inv(y)


class _Inverse:
    """Inverse under one context, which remembers its last result, as zuko asks for the log-determinant afterwards."""

    def __init__(self, fast: Any, c: torch.Tensor | None) -> None:
        self.fast, self.c = fast, c
        self.last: tuple[torch.Tensor, int, int, int | None, torch.Tensor] | None = None

    def version(self) -> int:
        """Return a number that changes with the context."""
        return 0 if self.c is None else version(self.c)

    def __call__(self, y: torch.Tensor) -> torch.Tensor:
        """Return x (*, D) of y (*, D)."""
        if not isinstance(self.fast, FastTransform):
            # The module was restored meanwhile.
            return self.fast(self.c).inv(y)
        x, logdet = self.fast.solve_rows(y, self.c)
        self.last = None if logdet is None else (x, version(x), self.version(), planned(self.fast), logdet)
        return x

    def log_abs_det_jacobian(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return log|det dy/dx| (*)."""
        if self.last and self.last[0] is x and not torch.is_grad_enabled() and isinstance(self.fast, FastTransform):
            _, *state, logdet = self.last
            if state == [version(x), self.version(), digest_of(self.fast, self.fast.places())]:
                return -logdet
        return self.fast.meta(self.c, x).log_abs_det_jacobian(x, y)


def _univariate(module: Any) -> Univariate | None:
    """Return the univariate transform of a module, or None if `masked_inverse` has no such."""
    function, options = module.univariate, {}
    if type(function) is functools.partial and not function.args:
        function, options = function.func, function.keywords
    shapes = [tuple(shape) for shape in module.shapes]
    if function is loaded("zuko.transforms", "MonotonicAffineTransform") and shapes == [(), ()]:
        return Univariate("affine_soft_clip", **options) if options.keys() <= {"slope"} else None
    if function is loaded("zuko.transforms", "MonotonicRQSTransform") and options.keys() <= {"slope", "bound"}:
        bins = shapes[0][0]
        if shapes == [(bins,), (bins,), (bins - 1,)]:
            return Univariate("spline_soft_clip", bins=bins, **options)
    return None


def candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, type[Accelerated] | str]]:
    """Return name, module, and fast class or reason of the transforms in a model."""
    transform = loaded("zuko.flows.autoregressive", "MaskedAutoregressiveTransform")
    for name, module in model.named_modules():
        if isinstance(module, transform):
            yield name, module, _fast(module, transform)


def _fast(module: nn.Module, transform: type) -> type[Accelerated] | str:
    original: Any = original_class(module)
    if (original.forward, original.meta) != (transform.forward, transform.meta):  # type: ignore[attr-defined]
        return "its class has a forward or a meta of its own"
    return FastTransform if module.passes > 2 else f"its inverse takes {module.passes} passes"
