"""Flow blocks one after the other, in both directions: what flows on images and on tokens share."""

from __future__ import annotations

import contextlib
import math
import reprlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import nn

from starflow_kernels import stack_inverse
from starflow_kernels._core.checks import NonFiniteError, all_finite
from starflow_kernels._core.compiled import reused_memory
from starflow_kernels._core.torch_private import is_intercepted
from starflow_kernels.adapters.distributions import FlowDistribution, InvertibleFlow, distribution
from starflow_kernels.solver import Inverse, Solver

from ..devices import check_device, check_dtype
from ..errors import ConfigError, InverseError
from ..settings import check_count
from .block import FlowBlock, Rotary
from .calibration import Calibration
from .checkpoint import load_weights, read_config, read_notice, resolve, save_notice, write_checkpoint
from .config import StackConfig
from .hooks import execution_device

PRIOR_RATE = 0.1
LOG_TWO_PI = math.log(2 * math.pi)
S = TypeVar("S", bound="BlockStack")


class BlockArguments(NamedTuple):
    """Arguments of a block: those of `FlowBlock.context`, and further ones of the ops by name."""

    context: tuple[torch.Tensor | None, torch.Tensor | None, Rotary]
    options: dict[str, Any]


class BlockStack(nn.Module):
    """Flow blocks and the prior of their latents.

    The attribute `calibration` holds the measured speed of the solvers, or None; `notice` holds a license notice of the
    weights, or nothing. Both are saved with the weights.

    Args:
        config: the configuration, of the class `CONFIG`.
    """

    CONFIG: type[StackConfig] = StackConfig

    # Weights made in inference mode could not be trained, nor read by the backward pass of denoising.
    @torch.inference_mode(False)
    def __init__(self, config: StackConfig):
        super().__init__()
        self.config = config
        self.calibration: Calibration | None = None
        self.notice = ""
        blocks = [FlowBlock(config.block_spec(i), *config.block_embeddings(i)) for i in range(len(config.layers))]
        self.blocks = cast("Sequence[FlowBlock]", nn.ModuleList(blocks))
        if config.scale == "unit":
            self.register_buffer("prior_variance", next(self.parameters()).new_ones(config.token_shape))
        else:
            self.prior_variance = None

    @torch.inference_mode(False)
    def _apply(self: S, *arguments: Any, **options: Any) -> S:
        """Move or convert the weights."""
        return super()._apply(*arguments, **options)

    def __repr__(self) -> str:
        config, parameters = self.config, sum(parameter.numel() for parameter in self.parameters())
        counts = config.layers[:1] if len(set(config.layers)) == 1 else config.layers
        layers = f"{', '.join(map(str, counts))} layer{'' if counts == (1,) else 's'}"
        width = f"width {config.channels}" + (f", last {config.last_channels}" if config.last_channels else "")
        tokens, token_dim = config.token_shape
        return (
            f"{type(self).__name__}({len(config.layers)} blocks of {layers}, "
            f"{width}, {tokens} tokens of {token_dim} values, {parameters:,} parameters)"
        )

    @classmethod
    def from_pretrained(
        cls: type[S],
        folder: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        *,
        mmap: bool = False,
    ) -> S:
        """Read a checkpoint folder, or a bundled checkpoint by its name ("digits"), in eval mode.

        Args:
            folder: path or name.
            device: device of the weights.
            dtype: dtype of the weights; None keeps the one of the file.
            mmap: map the weight files instead of copying them, which saves memory where device and dtype are those of
                the files. The files must then stay as they are while the flow is in use.

        Raises:
            CheckpointError: there is no checkpoint, a file is damaged, the weights do not fit the configuration, or the
                checkpoint is of another kind of flow.
            ConfigError: torch cannot use the device, or weights cannot have the dtype.
        """
        check_device(device)
        check_dtype(dtype)
        folder = resolve(folder)
        config = read_config(folder, cls.CONFIG)
        # Weights made in inference mode could not be trained, and would be packed at every call.
        with torch.inference_mode(False):
            with torch.device("meta"):
                flow = cls(config)
            load_weights(flow, folder, mmap)
            flow.notice = read_notice(folder)
            return flow.to(device=device, dtype=dtype).eval()

    def save_pretrained(self, folder: str | Path, state: dict[str, torch.Tensor] | None = None) -> None:
        """Write weights, configuration, calibration and notice into a folder; each file is written whole or not at all.

        Args:
            folder: the folder.
            state: weights to write in place of the flow's own.
        """
        write_checkpoint(folder, self.config, state or self.state_dict(), self.calibration)
        save_notice(self.notice, folder)

    @property
    def device(self) -> torch.device:
        """Device of the weights, also while accelerate keeps them elsewhere."""
        return execution_device(self)

    def _to_noise(
        self, tokens: torch.Tensor, arguments: Sequence[BlockArguments], **options: Any
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Map data to noise.

        Args:
            tokens: (B, T, D) data.
            arguments: arguments of each block.
            options: further arguments of `starflow_kernels.block_forward`.

        Returns:
            Log-determinant, (B,) or as `logdet` in the options says, and the tokens after each block.
        """
        logdet = tokens.new_zeros((), dtype=torch.promote_types(tokens.dtype, torch.float32))
        latents = []
        for block, (context, own) in zip(self.blocks, arguments):
            tokens, block_logdet = block(tokens, *context, **own, **options)
            logdet = logdet + block_logdet
            latents.append(tokens)
        return logdet, latents

    def _to_data(
        self,
        tokens: torch.Tensor,
        arguments: Sequence[BlockArguments],
        solvers: Solver | Sequence[Solver],
        progress: Callable[[int, int], None] | None = None,
        after_block: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
        backend: str | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, list[Inverse]]:
        """Map noise to data.

        Args:
            tokens: (B, T, D) noise.
            arguments: arguments of each block.
            solvers: one solver for all blocks, or one per block in the order of `blocks`.
            progress: called as progress(done, total) with tokens of all blocks.
            after_block: called as after_block(block, tokens) with the result of each block; returns its replacement.
            backend: name of the backend; None takes the first that can run.
            options: further arguments of `starflow_kernels.block_inverse`.

        Returns:
            (B, T, D) data, and the result of each block.

        Raises:
            TypeError: `solvers` is of the wrong kind.
            ValueError: an argument of the wrong shape or value.
            InverseError: the noise or data of a block is not finite; the message names the block.
        """
        count, each = len(self.blocks), tokens.shape[0] * tokens.shape[1]
        if isinstance(solvers, Solver):
            solvers = [solvers] * count
        elif not isinstance(solvers, Sequence) or not all(isinstance(solver, Solver) for solver in solvers):
            raise TypeError(f"solvers: expected a Solver, or one per block, got {reprlib.repr(solvers)}")
        if len(solvers) != count:
            raise ValueError(f"solvers: {len(solvers)} of them for {count} blocks")
        given = [(context, {**own, **options, "solver": solver}) for (context, own), solver in zip(arguments, solvers)]
        # One call takes no orders, and would need the conditions of all blocks at once.
        moves = any(own.get(name) is not None for _, own in given for name in ("order", "lengths"))
        by_itself = moves or is_intercepted() or any(map(FlowBlock.inverts_by_itself, self.blocks))
        if not (progress or after_block or by_itself):
            calls = [block.inverse_arguments(*context, own) for block, (context, own) in zip(self.blocks, given)]
            # Block by block, an error names the block.
            with contextlib.suppress(NonFiniteError):
                solved = stack_inverse(tokens, calls, backend=backend)
                return solved[0].x, solved
        solved = []
        with contextlib.nullcontext() if is_intercepted() else reused_memory():
            for i in reversed(range(count)):
                context, own = given[i]
                if progress:
                    before = (count - 1 - i) * each
                    own["progress"] = lambda done, _, before=before: progress(before + done, count * each)
                try:
                    result = self.blocks[i].inverse(tokens, *context, **own, backend=backend)
                except NonFiniteError as error:
                    if i + 1 < count:
                        self._check_finite(i + 1, tokens)
                    raise InverseError(f"block {i}: {error}") from error
                tokens = result.x
                solved.insert(0, result)
                if progress:
                    progress((count - i) * each, count * each)
                if after_block:
                    tokens = after_block(i, tokens)
        self._check_finite(0, tokens)
        return tokens, solved

    def _check_finite(self, block: int, tokens: torch.Tensor) -> None:
        """Raise InverseError if the result of a block is not finite; a graph has no values yet."""
        if is_intercepted() or not tokens.numel():
            return
        if all_finite(tokens := tokens.detach()):
            return
        own = tokens.flip(1) if self.blocks[block].spec.flip else tokens
        sample, token, _ = own.isfinite().logical_not().nonzero()[0].tolist()
        raise InverseError(f"block {block}: values are not finite at token {token} of sample {sample}")

    def distribution(self, *condition: torch.Tensor | None, **options: Any) -> FlowDistribution:
        """Return the distribution of the data under a condition, with the methods of torch.distributions.

        Args:
            condition: conditions in the order of `forward`. Dimensions in front of those of one sample are the batch
                dimensions of the distribution.
            options: further arguments of `starflow_kernels.adapters.distributions.FlowTransform`.
        """
        return distribution(cast("InvertibleFlow", self), *condition, **options)

    def _prior_variance(self) -> torch.Tensor:
        """Return the variance of each value of the noise, (T, D)."""
        if self.prior_variance is not None:
            return self.prior_variance
        return next(self.parameters()).new_ones(self.config.token_shape, device=self.device)

    def _log_prior(self, z: torch.Tensor) -> torch.Tensor:
        """Return the log density of each value of latents (B, T, D)."""
        variance = torch.ones_like(z[:1]) if self.prior_variance is None else self.prior_variance.to(z.dtype)
        return -0.5 * (z.square() / variance + variance.log() + LOG_TWO_PI)

    @torch.no_grad()
    def update_prior(self, z: torch.Tensor) -> None:
        """Move the prior variance of a volume-preserving flow toward the variance of z (B, T, D), if there are any."""
        if len(z):
            self.move_prior(z.square().mean(dim=0))

    @torch.no_grad()
    def move_prior(self, variance: torch.Tensor) -> None:
        """Move the prior variance of a volume-preserving flow toward one (T, D), if there are any."""
        if self.prior_variance is not None:
            self.prior_variance.lerp_(variance.to(self.prior_variance.dtype), PRIOR_RATE)

    def _noise(
        self, count: int, tokens: int, generator: torch.Generator | Sequence[torch.Generator] | None
    ) -> torch.Tensor:
        """Draw tokens of noise from the prior.

        Args:
            count: number of draws N.
            tokens: tokens per draw T.
            generator: one generator, or one per draw, which makes each draw independent of the others. Noise is drawn
                on the device of the generator, or on the CPU.

        Returns:
            (N, T, D) float32 noise on the device of the weights.

        Raises:
            ConfigError: `count` or `generator` is something else, or there are more or fewer generators than draws.
        """
        count = check_count("count", count, 0)
        shape = (count, tokens, self.config.token_shape[1])
        given = generator if isinstance(generator, Sequence) else [] if generator is None else [generator]
        if not all(isinstance(each, torch.Generator) for each in given):
            raise ConfigError(f"generator: expected a torch.Generator, or one per image, got {generator!r}")
        if isinstance(generator, Sequence):
            if len(generator) != count:
                raise ConfigError(f"generator: {len(generator)} of them for {count} images")
            z = torch.empty(shape, dtype=torch.float32, device=generator[0].device if count else "cpu")
            for row, each in zip(z, generator):
                row.normal_(generator=each)
        else:
            device = generator.device if generator else "cpu"
            z = torch.randn(shape, generator=generator, dtype=torch.float32, device=device)
        z = z.to(self.device)
        return z if self.prior_variance is None else z * self.prior_variance.sqrt()
