"""Flow on tokens or vectors: molecules, posteriors, tables, time series."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.distributions import Independent

from starflow_kernels._core.checks import check_finite, check_tensor
from starflow_kernels._core.token_order import check_counts, with_given
from starflow_kernels.adapters.distributions import normal
from starflow_kernels.solver import Solver

from ..seeds import generator
from .adaptive import AtomFeatures, check_atoms, check_kinds
from .conditions import Labels, check_labels, class_weights
from .hooks import runs_methods, with_forward_hooks
from .results import FlowInverse, FlowOutput, FlowSample
from .stack import BlockArguments, BlockStack
from .token_config import TokenFlowConfig
from .token_orders import Order, block_orders, of_known, shorter

Condition = Labels | int | None


class TokenFlow(BlockStack):
    """Normalizing flow on tokens (B, T, D) or vectors (B, F), with an exact density over all of their values.

    The density is that of data which `shift` and `scale` standardize, see `standardize`; its prior is standard normal.

    A condition is B integers for condition="class", -1 or None for no class; (B, condition_dim) for "vector"; (B, T,
    condition_dim) for "token"; and (B, T, 4) integers for "atoms", see `AtomFeatures`. Without the dimension B, it is
    the condition of all samples. Lengths are integers (B,), the number of the first tokens that belong to each sample.
    The others pass unchanged, add nothing to any result and influence nothing.

    Args:
        config: the configuration.
    """

    CONFIG = TokenFlowConfig
    config: TokenFlowConfig
    shift: torch.Tensor
    scale: torch.Tensor
    condition_shift: torch.Tensor
    condition_scale: torch.Tensor
    embedding: nn.Sequential | None

    @torch.inference_mode(False)
    def __init__(self, config: TokenFlowConfig):
        super().__init__(config)
        like = next(self.parameters())
        shape = config.token_shape if config.features else config.token_shape[1:]
        self.register_buffer("shift", like.new_zeros(shape))
        self.register_buffer("scale", like.new_ones(shape))
        self.embedding = None
        self.atoms = AtomFeatures(config.channels) if config.condition == "atoms" else None
        if config.condition_dim:
            self.register_buffer("condition_shift", like.new_zeros(config.condition_dim))
            self.register_buffer("condition_scale", like.new_ones(config.condition_dim))
        if config.embeds:
            width = config.channels
            # The network of atoms is that of Prose.
            activation = nn.GELU() if self.atoms is not None else nn.SiLU()
            self.embedding = nn.Sequential(nn.Linear(config.embeds, width), activation, nn.Linear(width, width))

    @classmethod
    def preset(cls, name: str, **settings: Any) -> TokenFlow:
        """Return a flow with new weights and the settings of a preset, see `TokenFlowConfig.preset`."""
        return cls(TokenFlowConfig.preset(name, **settings))

    @property
    def event_shape(self) -> torch.Size:
        """Shape of one sample."""
        return torch.Size((self.config.features,) if self.config.features else self.config.token_shape)

    @property
    def condition_ndims(self) -> tuple[int]:
        """Number of dimensions of the condition of one sample."""
        return ({"none": 0, "class": 0, "vector": 1, "token": 2, "atoms": 2}[self.config.condition],)

    def prior(self) -> Independent:
        """Return the distribution of the noise of one sample."""
        return normal(self._prior_variance().reshape(self.event_shape))

    @torch.no_grad()
    def standardize(
        self, x: torch.Tensor, condition: torch.Tensor | None = None, lengths: torch.Tensor | None = None
    ) -> None:
        """Set mean and standard deviation of the data and the condition, so that the blocks see standardized ones.

        They are per value of a vector, and per value of a token for all tokens together. A value that does not vary is
        only shifted.

        Args:
            x: (B, F) or (B, T, D) training data.
            condition: its condition, if that is a vector or per token. Atoms are not standardized.
            lengths: see `TokenFlow`.

        Raises:
            ValueError: a shape is wrong, or a mean or a deviation is not finite; the flow then keeps its own.
        """
        tokens, inside = self._tokens(x), self._inside(lengths, len(x))
        found = self._moments_of("x", tokens, 0 if self.config.features else (0, 1), inside)
        moments = dict(zip(("shift", "scale"), found))
        if condition is not None:
            condition = self._check_condition(condition, tokens)
            if self.atoms is None:
                dims, inside = ((0, 1), inside) if condition.ndim == 3 else (0, None)
                found = self._moments_of("condition", condition, dims, inside)
                moments |= zip(("condition_shift", "condition_scale"), found)
        for name, moment in moments.items():
            getattr(self, name).copy_(moment)

    def _moments_of(
        self, name: str, values: torch.Tensor, dims: int | tuple[int, int], inside: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and deviation of values over dimensions `dims`, of tokens inside (B, T) alone."""
        eps, values = torch.finfo(values.dtype).eps, values.double()
        counted = torch.ones_like(values, dtype=torch.bool)
        if inside is not None:
            counted = counted & inside[..., None]
        count = counted.sum(dims).clamp(min=1)
        mean = values.where(counted, 0).sum(dims) / count
        scale = (values - mean).where(counted, 0).square().sum(dims).div(count).sqrt()
        scale = scale.where(scale > eps * mean.abs(), 1)
        moments = mean.to(self.shift.dtype), scale.to(self.shift.dtype)
        check_finite(**{f"mean of {name}": moments[0], f"deviation of {name}": moments[1]})
        if not moments[1].all():
            raise ValueError(f"deviation of {name}: too small for {self.shift.dtype}")
        return moments

    @runs_methods
    def forward(
        self,
        x: torch.Tensor,
        condition: Condition = None,
        lengths: torch.Tensor | None = None,
        order: Order = None,
        *,
        known: torch.Tensor | None = None,
        dropout: float = 0.0,
        backend: str | None = None,
    ) -> FlowOutput:
        """Map data to noise, all tokens at once.

        Args:
            x: (B, F) vectors or (B, T, D) tokens, float32 or float64.
            condition: see `TokenFlow`.
            lengths: see `TokenFlow`.
            order: integers (T,) or (B, T), the numbers of the tokens in the order that takes the place of the ascending
                one; or a sequence of such orders, one per block, in place of the blocks' own.
            known: integers (B,). That many first tokens come before the others in every block, so that the others are
                transformed given these.
            dropout: dropout rate of the residual branches, see `starflow_kernels.block_forward`.
            backend: name of the backend; None takes the first that can run.
        """
        tokens, inside = self._tokens(x), self._inside(lengths, len(x))
        shift, scale = self._moments(tokens, inside)
        arguments = self._arguments(condition, lengths, order, known, tokens)
        logdet, latents = self._to_noise((tokens - shift) / scale, arguments, dropout=dropout, backend=backend)
        return FlowOutput(latents[-1].reshape(x.shape), logdet - scale.log().sum(dim=(1, 2)), latents)

    def log_prob(
        self,
        x: torch.Tensor,
        condition: Condition = None,
        lengths: torch.Tensor | None = None,
        order: Order = None,
        *,
        known: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the log density of data, which is differentiable.

        Args:
            x: as in `forward`.
            condition: see `TokenFlow`.
            lengths: see `TokenFlow`.
            order: as in `forward`.
            known: as in `forward`. The density is that of the other tokens given these.

        Returns:
            (B,) log density in nats.
        """
        if known is not None:
            return self._log_prob_given(x, condition, lengths, order, known)
        _, logdet, latents = self(x, condition, lengths, order)
        return logdet + self._prior(latents[-1], self._inside(lengths, len(x)))

    @with_forward_hooks
    def _log_prob_given(
        self, x: torch.Tensor, condition: Condition, lengths: torch.Tensor | None, order: Order, known: torch.Tensor
    ) -> torch.Tensor:
        """Return the log density of the tokens that are not known, which come after the known ones in every block."""
        tokens, inside = self._tokens(x), self._inside(lengths, len(x))
        shift, scale = self._moments(tokens, inside)
        arguments = self._arguments(condition, lengths, order, known, tokens)
        logdet, latents = self._to_noise((tokens - shift) / scale, arguments, logdet="none")
        free = ~cast("torch.Tensor", self._inside(known, len(x), "known"))
        free = (free if inside is None else free & inside)[..., None]
        # Padding may hold anything, even NaN, and has no gradient.
        values = logdet - scale.log() + self._log_prior(latents[-1].masked_fill(~free, 0))
        return values.masked_fill(~free, 0).sum(dim=(1, 2))

    @with_forward_hooks
    def inverse(
        self,
        z: torch.Tensor,
        condition: Condition = None,
        lengths: torch.Tensor | None = None,
        order: Order = None,
        *,
        data: torch.Tensor | None = None,
        known: torch.Tensor | None = None,
        solvers: Solver | Sequence[Solver] = Solver(),
        backend: str | None = None,
    ) -> FlowInverse:
        """Map noise to data. Result and log-determinant have gradients, see `starflow_kernels.block_inverse`.

        Args:
            z: (B, F) or (B, T, D) noise.
            condition: see `TokenFlow`.
            lengths: see `TokenFlow`.
            order: as in `forward`.
            data: data in the layout of z, of which the first tokens, `known` in number, are part of the result.
            known: integers (B,), how many tokens of `data` are given. The result is that of a density given them, see
                `log_prob`.
            solvers: one solver for all blocks, or one per block in the order of `blocks`.
            backend: name of the backend; None takes the first that can run.

        Returns:
            A `FlowInverse`: x in the layout of z, its log-determinant and the reports of the blocks.

        Raises:
            TypeError: an argument of the wrong kind.
            ValueError: an argument of the wrong shape or value.
            InverseError: the noise or data of a block is not finite; the message names the block.
        """
        if (data is None) != (known is None):
            raise ValueError("data, known: one is given without the other")
        tokens, inside = self._tokens(z, "z"), self._inside(lengths, len(z))
        shift, scale = self._moments(tokens, inside)
        arguments = self._arguments(condition, lengths, order, known, tokens)
        given = None
        if data is not None and known is not None:
            known = shorter(known, lengths)
            data, given = self._tokens(data, "data"), self._inside(known, len(z))
            start = (data - shift) / scale
            _, latents = self._to_noise(start, of_known(arguments, known, lengths, tokens), backend=backend)
            for (_, options), latent in zip(arguments, [start, *latents]):
                options.update(data=latent, known=known)
        # Padding may hold anything, even NaN.
        noise = tokens if inside is None else tokens.masked_fill(~inside[..., None], 0)
        x, solved = self._to_data(noise, arguments, solvers, backend=backend)
        x = with_given(x * scale + shift, data, given)
        x = x if inside is None else torch.where(inside[..., None], x, tokens)
        counts = scale if given is None else torch.where(given[..., None], 1, scale)
        return FlowInverse(x.reshape(z.shape), solved, counts.log().sum(dim=(1, 2)))

    @torch.no_grad()
    def sample(
        self,
        count: int,
        condition: Condition = None,
        *,
        seed: int | torch.Generator | None = 0,
        lengths: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Draw samples, without gradients.

        Args:
            count: number of samples N.
            condition: see `TokenFlow`.
            seed: seed of the noise, a generator, or None for the global generator of torch.
            lengths: see `TokenFlow`; the values of other tokens are 0.
            options: further arguments of `inverse`.

        Returns:
            (N, F) or (N, T, D) samples.
        """
        return self.inverse(self._draw(count, seed, lengths), condition, lengths, **options).x

    def rsample(
        self,
        count: int,
        condition: Condition = None,
        *,
        seed: int | torch.Generator | None = None,
        lengths: torch.Tensor | None = None,
        known: torch.Tensor | None = None,
        **options: Any,
    ) -> FlowSample:
        """Draw samples with their log density, both differentiable: for reverse KL and importance sampling.

        Args:
            count: number of samples N.
            condition: see `TokenFlow`.
            seed: as in `sample`.
            lengths: as in `sample`.
            known: as in `inverse`.
            options: further arguments of `inverse`.

        Returns:
            (N, F) or (N, T, D) samples and their log density (N,).
        """
        z = self._draw(count, seed, lengths)
        found = self.inverse(z, condition, lengths, known=known, **options)
        counted, given = self._inside(lengths, count), self._inside(known, count, "known")
        if given is not None:
            counted = ~given if counted is None else counted & ~given
        return FlowSample(found.x, self._prior(self._tokens(z), counted) - found.logdet)

    def _draw(self, count: int, seed: int | torch.Generator | None, lengths: torch.Tensor | None) -> torch.Tensor:
        """Draw noise in the layout of the data, 0 beyond the lengths."""
        source = seed if seed is None or isinstance(seed, torch.Generator) else generator(seed)
        z = self._noise(count, self.config.token_shape[0], source)
        z = z.to(torch.promote_types(self.shift.dtype, z.dtype))
        inside = self._inside(lengths, count)
        z = z if inside is None else z.masked_fill(~inside[..., None], 0)
        return z.flatten(1) if self.config.features else z

    def _tokens(self, x: torch.Tensor, name: str = "x") -> torch.Tensor:
        """Return data or noise (B, F) or (B, T, D) as tokens (B, T, D)."""
        tokens, token_dim = self.config.token_shape
        check_tensor(name, x, ("B", self.config.features) if self.config.features else ("B", tokens, token_dim))
        return x.reshape(len(x), tokens, token_dim)

    def _inside(self, counts: torch.Tensor | None, rows: int, name: str = "lengths") -> torch.Tensor | None:
        """Return whether each token is one of the first `counts` (B,) of its sample, (B, T); None for no counts."""
        if counts is None:
            return None
        tokens = self.config.token_shape[0]
        counts = check_counts(name, counts, rows, tokens).to(self.device)
        return torch.arange(tokens, dtype=torch.int64, device=self.device) < counts[:, None]

    def _moments(self, like: torch.Tensor, inside: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return shift and scale of each value of tokens `like`, (1 or B, T, D); 0 and 1 beyond the lengths."""
        shift, scale = (moment.to(like.dtype).expand(1, *like.shape[1:]) for moment in (self.shift, self.scale))
        if inside is None:
            return shift, scale
        return shift.where(inside[..., None], 0), scale.where(inside[..., None], 1)

    def _prior(self, z: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
        """Return the log density (B,) of latents (B, T, D) under the prior, over the tokens that are counted (B, T)."""
        if counted is None:
            return self._log_prior(z).sum(dim=(1, 2))
        # Padding may hold anything, even NaN, and has no gradient.
        values = self._log_prior(z.masked_fill(~counted[..., None], 0))
        return values.masked_fill(~counted[..., None], 0).sum(dim=(1, 2))

    def _arguments(
        self,
        condition: Condition,
        lengths: torch.Tensor | None,
        order: Order,
        known: torch.Tensor | None,
        tokens: torch.Tensor,
    ) -> list[BlockArguments]:
        """Return the arguments of the blocks for tokens (B, T, D)."""
        features = self._features(condition, lengths, tokens)
        orders = block_orders(self.blocks, self.config.orders, order, known, tokens)
        return [BlockArguments((features, None, (None, None)), {"order": own, "lengths": lengths}) for own in orders]

    def _features(self, condition: Condition, lengths: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
        """Return what the blocks embed of a condition, in the dtype and on the device of tokens `like` (B, T, D)."""
        config, rows = self.config, len(like)
        if config.condition == "class":
            if isinstance(condition, (int, np.integer)):
                condition = [int(condition)] * rows
            elif isinstance(condition, torch.Tensor) and condition.ndim == 0:
                condition = condition.expand(rows)
            if condition is not None:
                condition = check_labels("condition", condition, config.num_classes, rows, like.device)
            return class_weights(config, condition, like)
        if self.embedding is None and condition is None:
            return None
        values = self._check_condition(condition, like)
        inside = None if config.condition == "vector" else self._inside(lengths, rows)
        values = values if inside is None else values.masked_fill(~inside[..., None], 0)
        if self.atoms is not None:
            check_kinds(values)
            values = self.atoms(values)
        else:
            values = (values.to(self.condition_shift.dtype) - self.condition_shift) / self.condition_scale
        features = cast("nn.Sequential", self.embedding)(values)
        return features if inside is None else features.masked_fill(~inside[..., None], 0)

    def _check_condition(self, condition: Condition, like: torch.Tensor) -> torch.Tensor:
        """Return the values of a condition of tokens `like` (B, T, D), those of all samples repeated, or raise."""
        config, (rows, tokens, _) = self.config, like.shape
        if self.embedding is None:
            raise ValueError(f"condition: takes no values with condition={config.condition!r}")
        shapes = {"vector": (config.condition_dim,), "atoms": (tokens, 4)}
        shape = rows, *shapes.get(config.condition, (tokens, config.condition_dim))
        if isinstance(condition, torch.Tensor) and condition.shape == shape[1:]:
            condition = condition.expand(shape)
        if config.condition == "atoms":
            return check_atoms(condition, shape, like.device)
        check_tensor("condition", condition, shape, like=like)
        return cast("torch.Tensor", condition)
