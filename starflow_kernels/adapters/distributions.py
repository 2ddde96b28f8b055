"""Flows as transforms and distributions of torch.distributions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import torch
from torch.distributions import Distribution, Independent, Normal, Transform, TransformedDistribution, constraints

from .._core.checks import format_shape
from ..block.api import block_forward, block_inverse
from ..solver import Inverse
from ..spec import BlockSpec


class InvertibleFlow(Protocol):
    """Protocol of flows that the adapters take, such as `starflow.TokenFlow`, `starflow.Flow` and `BlockFlow`.

    Attributes:
        event_shape: shape of one sample of the data, which is that of its noise.
        condition_ndims: number of dimensions of each condition of one sample, in the order of the arguments.
    """

    event_shape: torch.Size
    condition_ndims: tuple[int, ...]

    def prior(self) -> Distribution:
        """Return the distribution of the noise, of the shape `event_shape`."""

    def __call__(self, x: torch.Tensor, *condition: torch.Tensor | None) -> tuple[Any, ...]:
        """Return noise (B, *event_shape), log|det dz/dx| (B,), and anything else."""

    def inverse(self, z: torch.Tensor, *condition: torch.Tensor | None, **options: Any) -> Any:
        """Return a result with data `x` (B, *event_shape) and `logdet` (B,), log|det dx/dz|."""


class BlockFlow:
    """One block as a flow on tokens (B, T, D), for the adapters. It is no module: its weights stay with their owner.

    Args:
        weights: weights by name, see `block_forward`.
        spec: the block.
        tokens: T, tokens per sample.
        per_token: whether the condition of a sample is (T, C) instead of (C,).
        options: further arguments of both directions, such as `cos`, `sin` and `order`.
    """

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        spec: BlockSpec,
        tokens: int,
        *,
        per_token: bool = False,
        **options: Any,
    ) -> None:
        self.weights, self.spec, self.options = weights, spec, options
        self.event_shape = torch.Size((tokens, spec.token_dim))
        self.condition_ndims = (2 if per_token else 1,)

    def prior(self) -> Distribution:
        """Return the standard normal distribution of the noise."""
        return normal(next(iter(self.weights.values())).new_ones(self.event_shape))

    def __call__(self, x: torch.Tensor, cond: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Map data to noise, see `block_forward`."""
        return block_forward(x, self.weights, self.spec, cond=cond, **self.options)

    def inverse(self, z: torch.Tensor, cond: torch.Tensor | None = None, **options: Any) -> Inverse:
        """Map noise to data, see `block_inverse`."""
        return block_inverse(z, self.weights, self.spec, cond=cond, **self.options, **options)


def normal(variance: torch.Tensor) -> Independent:
    """Return the normal distribution of independent values with mean 0 and the variances given, in float32 or wider."""
    variance = variance.detach().to(torch.promote_types(variance.dtype, torch.float32))
    return Independent(Normal(torch.zeros_like(variance), variance.sqrt(), validate_args=False), variance.ndim)


class Pair:
    """Data and its noise. The log-determinant is computed when it is first read.

    Args:
        x: the data.
        z: the noise.
        compute: function that returns log|det dz/dx|.
    """

    def __init__(self, x: torch.Tensor, z: torch.Tensor, compute: Callable[[], torch.Tensor]) -> None:
        self.x, self.z, self._compute = x, z, compute
        self._logdet: torch.Tensor | None = None
        self._differentiable = torch.is_grad_enabled()

    def is_valid(self) -> bool:
        """Return whether the pair has the gradients that are asked for, which without a graph would be lost."""
        return self._differentiable or not torch.is_grad_enabled()

    @property
    def logdet(self) -> torch.Tensor:
        """Log|det dz/dx|."""
        if self._logdet is None:
            # It may first be read where gradients are disabled.
            with torch.set_grad_enabled(self._differentiable):
                self._logdet = self._compute()
        return self._logdet


class ConditionedFlow:
    """Both directions of a flow under a condition, for any batch dimensions; remembers the last pair if asked to.

    Args:
        flow: the flow.
        condition: conditions (*batch, ...), in the order of the flow's arguments; None for one that is left out.
        options: further arguments of `flow.inverse`.
        remember: whether the last pair is kept.
    """

    def __init__(
        self, flow: InvertibleFlow, condition: tuple[torch.Tensor | None, ...], options: dict[str, Any], remember: bool
    ) -> None:
        self.flow, self.condition, self.options, self.remember = flow, condition, options, remember
        self.last: Pair | None = None
        if len(condition) > len(flow.condition_ndims):
            raise TypeError(f"condition: {len(condition)} of them, the flow takes {len(flow.condition_ndims)}")
        shapes = []
        for value, ndim in zip(condition, flow.condition_ndims):
            if value is None:
                continue
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"condition: expected a tensor, got {type(value).__name__}")
            if value.ndim < ndim:
                shape = format_shape(tuple(value.shape))
                raise ValueError(f"condition: expected at least {ndim} dimensions, got shape {shape}")
            shapes.append(value.shape[: value.ndim - ndim])
        self.batch_shape = self._broadcast(*shapes)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "last": None}

    def _broadcast(self, *shapes: torch.Size) -> torch.Size:
        try:
            return torch.broadcast_shapes(*shapes)
        except RuntimeError:
            each = ", ".join(format_shape(tuple(shape)) for shape in shapes)
            raise ValueError(f"batch dimensions {each} of values and conditions do not broadcast") from None

    def full_shape(self, shape: torch.Size) -> torch.Size:
        """Return the shape of results for values (*batch, *event_shape) of a shape."""
        count = len(shape) - len(self.flow.event_shape)
        if count < 0:
            wanted = format_shape(("...", *self.flow.event_shape))
            raise ValueError(f"expected values of shape {wanted}, got {format_shape(tuple(shape))}")
        return self._broadcast(shape[:count], self.batch_shape) + shape[count:]

    def to_noise(self, x: torch.Tensor) -> Pair:
        """Map data (*batch, *event_shape) to noise."""
        if self.last is not None and x is self.last.x and self.last.is_valid():
            return self.last
        shape, rows, condition = self._rows(x)
        z, logdet, *_ = self.flow(rows, *condition)
        return self._keep(Pair(x, z.reshape(shape), lambda: logdet.reshape(self._batch(shape))))

    def to_data(self, z: torch.Tensor) -> Pair:
        """Map noise (*batch, *event_shape) to data."""
        if self.last is not None and z is self.last.z and self.last.is_valid():
            return self.last
        shape, rows, condition = self._rows(z)
        found = self.flow.inverse(rows, *condition, **self.options)
        return self._keep(Pair(found.x.reshape(shape), z, lambda: -found.logdet.reshape(self._batch(shape))))

    def logdet(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Return log|det dz/dx| of a pair, which costs a pass unless the pair is the last one."""
        last = self.last
        if last is not None and x is last.x and z is last.z and last.is_valid():
            return last.logdet
        return self.to_noise(x).logdet

    def _keep(self, pair: Pair) -> Pair:
        self.last = pair if self.remember else None
        return pair

    def _batch(self, shape: torch.Size) -> torch.Size:
        return shape[: len(shape) - len(self.flow.event_shape)]

    def _rows(self, values: torch.Tensor) -> tuple[torch.Size, torch.Tensor, list[torch.Tensor | None]]:
        """Return the shape of the results, and values and conditions with one batch dimension."""
        shape = self.full_shape(values.shape)
        batch = self._batch(shape)

        def rows(value: torch.Tensor, ndim: int) -> torch.Tensor:
            own = value.shape[value.ndim - ndim :]
            return value.expand(batch + own).reshape(batch.numel(), *own)

        ndims = self.flow.condition_ndims
        condition = [None if value is None else rows(value, ndim) for value, ndim in zip(self.condition, ndims)]
        return shape, rows(values, len(self.flow.event_shape)), condition


class _Direction(Transform):
    """One direction of a flow under a condition."""

    bijective = True

    def __init__(self, conditioned: ConditionedFlow) -> None:
        super().__init__(cache_size=int(conditioned.remember))
        self._conditioned = conditioned
        self.domain = self.codomain = constraints.independent(constraints.real, len(conditioned.flow.event_shape))

    def clear_cache(self) -> None:
        """Forget the last pair, as is needed after a change of the weights."""
        self._conditioned.last = None

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """Return the shape of the result for values (*batch, *event_shape) of a shape."""
        return self._conditioned.full_shape(torch.Size(shape))

    inverse_shape = forward_shape


class FlowTransform(_Direction):
    """Transform of data to noise by a flow under a condition; `inv` transforms noise to data by the flow's inverse.

    Batch dimensions of values and conditions broadcast. Gradients flow in both directions, to values, conditions and
    weights. `inv` has all methods that are here, with the determinant from the solve itself.

    Args:
        flow: the flow, see `InvertibleFlow`.
        condition: conditions (*batch, ...), in the order of the flow's arguments after the data.
        cache_size: 1 keeps the last pair of data and noise with its log-determinant, as other transforms of torch do.
            It is that of the weights at the time of the call, and a sample's noise has no gradient with respect to the
            sample.
        options: further arguments of `flow.inverse`, such as `solvers`.

    Raises:
        TypeError: a condition is no tensor, or there are more of them than the flow takes.
        ValueError: batch dimensions do not broadcast.
    """

    def __init__(
        self, flow: InvertibleFlow, *condition: torch.Tensor | None, cache_size: int = 0, **options: Any
    ) -> None:
        super().__init__(ConditionedFlow(flow, condition, options, bool(cache_size)))

    @property
    def batch_shape(self) -> torch.Size:
        """Batch dimensions of the condition."""
        return self._conditioned.batch_shape

    @property
    def inv(self) -> _FlowInverse:
        """Transform of noise to data."""
        if self._inv is None:
            self._inv = _FlowInverse(self, self._conditioned)
        return cast("_FlowInverse", self._inv)

    def with_cache(self, cache_size: int = 1) -> FlowTransform:
        """Return the transform with another cache size."""
        if cache_size == self._cache_size:
            return self
        own = self._conditioned
        return type(self)(own.flow, *own.condition, cache_size=cache_size, **own.options)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the noise (*batch, *event_shape) of data."""
        return self._conditioned.to_noise(x).z

    def call_and_ladj(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return noise (*batch, *event_shape) and log|det dz/dx| (*batch) of data, by one pass."""
        pair = self._conditioned.to_noise(x)
        return pair.z, pair.logdet

    def log_abs_det_jacobian(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return log|det dz/dx| (*batch) of data and its noise."""
        return self._conditioned.logdet(x, y)


class _FlowInverse(_Direction):
    """Transform of noise to data, which unlike the inverses of torch has `call_and_ladj`."""

    def __init__(self, transform: FlowTransform, conditioned: ConditionedFlow) -> None:
        super().__init__(conditioned)
        self._transform = transform

    @property
    def inv(self) -> FlowTransform:
        """Transform of data to noise."""
        return self._transform

    def with_cache(self, cache_size: int = 1) -> Transform:
        """Return the transform with another cache size."""
        return self._transform.with_cache(cache_size).inv

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the data (*batch, *event_shape) of noise."""
        return self._conditioned.to_data(x).x

    def call_and_ladj(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return data (*batch, *event_shape) and log|det dx/dz| (*batch) of noise, by one solve."""
        pair = self._conditioned.to_data(x)
        return pair.x, -pair.logdet

    def log_abs_det_jacobian(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return log|det dx/dz| (*batch) of noise and its data."""
        return -self._conditioned.logdet(y, x)


class FlowDistribution(TransformedDistribution):
    """Distribution of the data of a flow, see `distribution`; other methods are those of `TransformedDistribution`."""

    @property
    def _to_data(self) -> _FlowInverse:
        return cast("_FlowInverse", self.transforms[0])

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        """Return the log density (*batch) of data (*batch, *event_shape), by one pass.

        Args:
            value: the data.
        """
        if self._validate_args:
            self._validate_sample(value)
        z, logdet = self._to_data.inv.call_and_ladj(value)
        return self.base_dist.log_prob(z) + logdet

    def rsample_and_log_prob(self, sample_shape: torch.Size = torch.Size()) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw samples with their log density, both differentiable, by one solve.

        Args:
            sample_shape: dimensions in front of those of the batch.

        Returns:
            (*sample_shape, *batch_shape, *event_shape) samples and (*sample_shape, *batch_shape) log density.
        """
        z = self.base_dist.rsample(sample_shape)
        x, logdet = self._to_data.call_and_ladj(z)
        return x, self.base_dist.log_prob(z) - logdet


def distribution(flow: InvertibleFlow, *condition: torch.Tensor | None, **options: Any) -> FlowDistribution:
    """Return the distribution of a flow's data under a condition.

    Args:
        flow: the flow.
        condition: as in `FlowTransform`; their batch dimensions are those of the distribution.
        options: as in `FlowTransform`.
    """
    return FlowDistribution(flow.prior(), [FlowTransform(flow, *condition, **options).inv])
