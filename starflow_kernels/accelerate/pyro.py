"""Affine autoregressive transforms of Pyro, with and without a context."""

from __future__ import annotations

import abc
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .._core.torch_private import outside_graphs
from ..masked_inverse.network import Univariate
from .autoregressive import ROWS, Autoregressive, applies
from .columns import Recognized
from .networks import pyro_layers
from .swap import Accelerated, disagreement, fast_class, loaded, original_class, seen_as

# Arguments of the class after its network.
OPTIONS = ("log_scale_min_clip", "log_scale_max_clip", "sigmoid_bias", "stable")


class FastInverse(Autoregressive):
    """Inverse of `pyro.distributions.transforms.AffineAutoregressive`."""

    def conditioner(self) -> tuple[nn.Module, torch.Tensor | None]:
        """Return the network, and the context (*, C) of a transform that `condition` has returned."""
        bound = isinstance(self.arn, functools.partial)
        return (self.arn.func, self.arn.keywords["context"]) if bound else (self.arn, None)

    def sizes(self) -> tuple[int, int]:
        """Return the number of values, and 0: a context belongs to the transform already."""
        return self.conditioner()[0].input_dim, 0

    def like(self) -> torch.Tensor:
        """Return a tensor with the dtype and the device of the weights."""
        return next(self.conditioner()[0].parameters())

    def places(self) -> torch.Tensor:
        """Return the place (D,) of each value in the order in which they depend on each other."""
        return self.conditioner()[0].permutation.argsort()

    def network(self) -> nn.Module:
        """Return the network."""
        return self.conditioner()[0]

    def recognized(self, context: torch.Tensor | None) -> Recognized | None:
        """Return the layers and the univariate transform, or None."""
        layers = pyro_layers(self.network(), context)
        if self.stable:
            transform = Univariate("affine_convex", bias=self.sigmoid_bias)
        else:
            transform = Univariate("affine_clamp", low=self.log_scale_min_clip, high=self.log_scale_max_clip)
        return Recognized(layers, transform, interleaved=False) if layers else None

    def step(self, x: torch.Tensor, y: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        """Return x of y by the parameters that belong to another x."""
        return self.with_log_scale(x, y, context)[0]

    def with_log_scale(
        self, x: torch.Tensor, y: torch.Tensor, context: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x of y, and the log of the scales, by the parameters that belong to another x."""
        net, _ = self.conditioner()
        mean, raw = net(x) if context is None else net(x, context)
        if self.stable:
            inverse_scale = 1 + torch.exp(-raw - self.sigmoid_bias)
            return inverse_scale * y + (1 - inverse_scale) * mean, self.logsigmoid(raw + self.sigmoid_bias)
        # Pyro clamps the values, but not their gradients.
        log_scale = raw + (raw.clamp(self.log_scale_min_clip, self.log_scale_max_clip) - raw).detach()
        return (y - mean) * torch.exp(-log_scale), log_scale

    @staticmethod
    def inverse_rows(module: Any, y: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        """Return x of y."""
        return module.inv(y)

    @classmethod
    def check(cls, module: Any) -> str | None:
        """Return why the module cannot be accelerated, or None."""
        # Values that the module remembers may belong to a graph, and those cannot be copied.
        fresh = type(module)(module.arn, *(getattr(module, name) for name in OPTIONS))
        return super().check(fresh)

    @outside_graphs("values decide how many passes follow")
    def _inv_call(self, y: torch.Tensor) -> torch.Tensor:
        net, context = self.conditioner()
        if (self._cache_size and y is self._cached_x_y[1]) or not applies(net, y, context):
            return super()._inv_call(y)
        rows = y.reshape(-1, y.shape[-1])
        if context is not None:
            context = context.expand(*y.shape[:-1], -1).reshape(len(rows), -1)
        x, _ = self.solve(rows, context)
        x, log_scale = self.with_log_scale(x, rows, context)
        if not x.isfinite().all():
            # Pyro's loop keeps values at zero until it reaches them, so theirs cannot overflow in between.
            return super()._inv_call(y)
        x, self._cached_log_scale = x.reshape(y.shape), log_scale.reshape(y.shape)
        if self._cache_size:
            self._cached_x_y = x, y
        return x

    def loop(self, y: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        """Return x (N, D) of y by Pyro's loop."""
        net, _ = self.conditioner()
        view = seen_as(self.original, self)
        if context is not None:
            vars(view)["arn"] = bound = functools.partial(net, context=context)
            bound.permutation = net.permutation  # type: ignore[attr-defined]
        return getattr(self.original, "_inverse_stable" if self.stable else "_inverse")(view, y)


# Python exchanges classes whose attributes lie alike: ABC is the first base of the original too.
class FastCondition(abc.ABC, Accelerated):
    """Transforms that `ConditionalAffineAutoregressive` returns, with a fast inverse."""

    description = "transforms with a fast inverse"

    @classmethod
    def check(cls, module: nn.Module) -> str | None:
        """Return why the transform under a random context cannot be accelerated, or None."""

        def compare(copied: Any) -> tuple[torch.Tensor, torch.Tensor]:
            generator = torch.Generator(device="cpu").manual_seed(0)
            size = ROWS, copied.nn.context_dim
            context = torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")
            context = context.to(next(copied.parameters()))
            transform = copied.condition(context)
            return fast_class(FastInverse, type(transform), cls.tol).compare(transform, context)

        return disagreement(module, compare)

    def condition(self, context: torch.Tensor) -> Any:
        """Return the transform under a context (*, C)."""
        transform = super().condition(context)
        transform.__class__ = fast_class(FastInverse, type(transform), self.tol)
        return transform


def candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, type[Accelerated] | str]]:
    """Return name, module, and fast class or reason of the transforms in a model."""
    library = "pyro.distributions.transforms.affine_autoregressive"
    nets = loaded("pyro.nn.auto_reg_nn", "ConditionalAutoRegressiveNN")
    plain, conditional = loaded(library, "AffineAutoregressive"), loaded(library, "ConditionalAffineAutoregressive")
    for name, module in model.named_modules():
        if original_class(module) in (plain, conditional):
            of_context = original_class(module) is conditional
            known = isinstance(module.nn if of_context else module.arn, nets)
            fast = FastCondition if of_context else FastInverse
            yield name, module, fast if known else "its network is not one of the library"
