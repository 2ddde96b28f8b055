"""The flow: TarFlow (arXiv 2412.06329) and STARFlow (arXiv 2506.06276) as one model."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributions import Independent

from starflow_kernels._core.implicit import needs_gradient
from starflow_kernels._core.torch_private import is_intercepted
from starflow_kernels.adapters.distributions import normal
from starflow_kernels.solver import Solver
from starflow_kernels.spec import Quantize

from ..errors import ConfigError
from ..settings import check_count
from .calibration import Calibration, Measurement, read_calibration
from .checkpoint import resolve
from .conditions import BlockCondition, block_conditions, check_conditions
from .config import FlowConfig
from .guidance import Guidance
from .hooks import runs_methods, with_forward_hooks
from .results import FlowInverse, FlowOutput
from .stack import BlockArguments, BlockStack
from .tokens import patchify, rotary_table, unpatchify

# `Flow.sample` and `Flow.calibrate` are implemented in these modules, which use flows.
if TYPE_CHECKING:
    from ..sampling.sample import Inversion, Samples


class Flow(BlockStack):
    """Normalizing flow on images (B, C, H, W) scaled to [-1, 1], or on latents of an autoencoder.

    Both directions keep the layout of the images. Labels are B integers, -1 for no class: a tensor or array of any
    integer dtype, or a sequence. Text is (B, L, text_dim) states of a text encoder, zero at the padding.

    Args:
        config: the configuration.
    """

    CONFIG = FlowConfig
    config: FlowConfig

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        *,
        mmap: bool = False,
    ) -> Flow:
        """Read weights, configuration and calibration; see `BlockStack.from_pretrained`."""
        flow = super().from_pretrained(folder, device, dtype, mmap=mmap)
        flow.calibration = read_calibration(resolve(folder), flow.config)
        return flow

    def sample(
        self,
        count: int,
        labels: torch.Tensor | None = None,
        *,
        seed: int = 0,
        batch_size: int = 256,
        guidance: Guidance = Guidance(),
        inversion: Inversion | None = None,
        denoise: float = 0.0,
        certify: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Samples:
        """Draw images.

        Args:
            count: number of images N.
            labels: (N,) int64 classes, -1 for no class.
            seed: seed of the noise, which does not depend on the batch size.
            batch_size: images per batch.
            guidance: guidance toward the classes.
            inversion: solvers to use, `Inversion()` by default.
            denoise: factor of a step along the score after sampling, see `denoise`; 0 for none.
            certify: map the images back to noise and report the largest difference.
            progress: called as progress(done, total) with tokens of all blocks and images.

        Returns:
            uint8 images (N, C, H, W) on the CPU, and a `SampleReport`.

        Raises:
            ConfigError: an argument is out of range, or the flow is on latents; a pipeline with their autoencoder draws
                images from it.
            InverseError: values are not finite.
        """
        from ..sampling.sample import Inversion, SampleOptions, sample

        options = SampleOptions(guidance, inversion or Inversion(), denoise, certify)
        return sample(self, count, labels, seed=seed, batch_size=batch_size, options=options, progress=progress)

    def calibrate(self, batch_size: int = 10, guidance: Guidance = Guidance(), **options: Any) -> Measurement:
        """Measure which solver is fastest for each block on this machine, and add the result to `calibration`.

        Args:
            batch_size: images per batch.
            guidance: guidance of the samples.
            options: further arguments of `starflow.inversion.measure.calibrate`.

        Returns:
            The measurement.
        """
        from ..inversion.measure import calibrate

        measurement = calibrate(self, batch_size, guidance, **options)
        calibration = self.calibration or Calibration(self.config.grid, self.config.token_dim)
        self.calibration = calibration.add(measurement)
        return measurement

    @property
    def event_shape(self) -> torch.Size:
        """Shape of a training image, (C, H, W)."""
        size = self.config.image_size
        return torch.Size((self.config.image_channels, size, size))

    @property
    def condition_ndims(self) -> tuple[int, int]:
        """Number of dimensions of the label and of the text states of one image."""
        return 0, 2

    def prior(self) -> Independent:
        """Return the distribution of the noise of one image."""
        return normal(self.images(self._prior_variance()[None])[0])

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """Split images (B, C, H, W) into tokens (B, T, D)."""
        self._check_images(images)
        return patchify(images, self.config.patch_size, self.config.patch_order)

    def _check_images(self, images: torch.Tensor) -> None:
        if not isinstance(images, torch.Tensor):
            raise TypeError(f"images: expected a tensor, got {type(images).__name__}")
        channels = self.config.image_channels
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(f"images: expected shape (B, {channels}, H, W), got {tuple(images.shape)}")
        if not images.is_floating_point():
            raise ValueError(
                f"images: expected a floating-point dtype, got {images.dtype}; scale pixels to [-1, 1] and add noise, "
                "see starflow.data.datasets.dequantize"
            )
        size = self.config.image_size
        if self.config.rotary == "none" and images.shape[2:] != (size, size):
            height, width = images.shape[2:]
            raise ValueError(f"images of {height}x{width} pixels: this model takes {size}x{size}")

    def images(self, tokens: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """Join tokens (B, T, D) to images (B, C, H, W).

        Args:
            tokens: the tokens.
            grid: rows and columns of tokens, by default the ones of training.
        """
        return unpatchify(tokens, grid or self.config.grid, self.config.patch_size, self.config.patch_order)

    @runs_methods
    def forward(
        self,
        x: torch.Tensor,
        labels: torch.Tensor | None = None,
        text: torch.Tensor | None = None,
        dropout: float = 0.0,
        backend: str | None = None,
    ) -> FlowOutput:
        """Map data to noise, all tokens at once.

        Args:
            x: (B, C, H, W) data.
            labels: (B,) int64 classes, -1 for no class.
            text: (B, L, text_dim) text states.
            dropout: dropout rate of the residual branches, see `starflow_kernels.block_forward`.
            backend: name of the backend; None takes the first that can run.
        """
        tokens, grid = self.tokens(x), self.grid(x)
        contexts = self.contexts(check_conditions(self.config, labels, text, x), text, x)
        arguments = self._arguments(contexts, grid, tokens)
        logdet, latents = self._to_noise(tokens, arguments, dropout=dropout, backend=backend)
        return FlowOutput(self.images(latents[-1], grid), logdet, latents)

    def log_prob(
        self, x: torch.Tensor, labels: torch.Tensor | None = None, text: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the log density of data.

        Args:
            x: (B, C, H, W) data.
            labels: (B,) int64 classes, -1 for no class.
            text: (B, L, text_dim) text states.

        Returns:
            (B,) log density in nats.
        """
        _, logdet, latents = self(x, labels, text)
        return logdet + self._log_prior(latents[-1]).sum(dim=(1, 2))

    def loss(self, output: FlowOutput, latent_penalty: float = 0.0) -> torch.Tensor:
        """Negative log-likelihood per dimension without its constant: mean z^2 / 2 - logdet / dimensions.

        Args:
            output: result of the density direction.
            latent_penalty: weight of the mean squares of the inner blocks' latents (STARFlow: 1e-4).
        """
        z = output.latents[-1]
        loss = 0.5 * z.square().mean() - output.logdet.mean() / z.shape[1:].numel()
        return loss + latent_penalty * sum(latent.square().mean() for latent in output.latents[:-1])

    @with_forward_hooks
    def inverse(
        self,
        z: torch.Tensor,
        labels: torch.Tensor | None = None,
        text: torch.Tensor | None = None,
        guidance: Guidance = Guidance(),
        empty_text: torch.Tensor | None = None,
        backend: str | None = None,
        progress: Callable[[int, int], None] | None = None,
        after_block: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
        solvers: Solver | Sequence[Solver] = Solver(),
        quantize: Quantize = "none",
    ) -> FlowInverse:
        """Map noise to data. Result and log-determinant have gradients, see `starflow_kernels.block_inverse`.

        Args:
            z: (B, C, H, W) noise.
            labels: (B,) int64 classes, -1 for no class.
            text: (B, L, text_dim) text states.
            guidance: guidance toward the class or text.
            empty_text: (B or 1, L, text_dim) states that guidance moves away from, usually of the empty prompt.
            backend: name of the backend; None takes the first that can run.
            progress: called as progress(done, total) with tokens of all blocks. An exception from it ends the call.
            after_block: called as after_block(block, x) with the result of each block as images; returns its
                replacement.
            solvers: one solver for all blocks, or one per block in the order of `blocks`.
            quantize: "int8", "fp8" or "bfloat16" rounds weights, the last one inputs of products too, see
                `starflow_kernels.block_inverse`.

        Returns:
            A `FlowInverse`: x (B, C, H, W), its log-determinant and the reports of the blocks.

        Raises:
            ConfigError: guidance has no condition, no text to move away from, and no temperature.
            TypeError: `z`, `solvers` or the result of `after_block` is of the wrong kind.
            ValueError: an argument of the wrong shape or value, or one that needs a gradient that there is none.
            InverseError: the noise or data of a block is not finite; the message names the block. A graph of
                torch.compile or torch.export raises ValueError, and does not check the result.
        """
        tokens, grid = self.tokens(z), self.grid(z)
        labels = check_conditions(self.config, labels, text, z)
        differentiable = not guidance.weight and quantize == "none" and not is_intercepted()
        if not differentiable and needs_gradient(z, text, empty_text):
            raise ValueError(
                "z, text, empty_text: the inverse has no gradient under guidance, with `quantize` or in a graph; "
                "detach them"
            )

        def replace(after_block: Callable, block: int, tokens: torch.Tensor) -> torch.Tensor:
            x = after_block(block, self.images(tokens, grid))
            if not isinstance(x, torch.Tensor):
                raise TypeError(f"after_block: expected it to return images, got {type(x).__name__}")
            return self.tokens(x)

        after = functools.partial(replace, after_block) if after_block else None
        with contextlib.nullcontext() if differentiable else torch.no_grad():
            contexts = self.contexts(labels, text, z, guidance, empty_text)
            x, solved = self._to_data(
                tokens, self._arguments(contexts, grid, tokens, guidance), solvers, progress, after,
                quantize=quantize, backend=backend,
            )  # fmt: skip
            return FlowInverse(self.images(x, grid), solved)

    def _arguments(
        self,
        contexts: Sequence[BlockCondition],
        grid: tuple[int, int],
        tokens: torch.Tensor,
        guidance: Guidance = Guidance(),
    ) -> list[BlockArguments]:
        """Return the arguments of the blocks for tokens (B, T, D) of a grid."""
        return [
            BlockArguments(
                (*context, self.rotary(i, grid, tokens)),
                guidance.options(tokens.shape[1], self.config.start, tokens.device) if guided else {},
            )
            for i, (context, guided) in enumerate(contexts)
        ]

    def contexts(
        self,
        labels: torch.Tensor | None,
        text: torch.Tensor | None,
        like: torch.Tensor,
        guidance: Guidance = Guidance(),
        empty_text: torch.Tensor | None = None,
    ) -> list[BlockCondition]:
        """Return the condition of each block.

        Args:
            labels: (B,) int64 classes, -1 for no class.
            text: (B, L, text_dim) text states.
            like: (B, ...) tensor with the dtype and device of the class weights.
            guidance: guidance toward the class or text.
            empty_text: (B or 1, L, text_dim) states that guidance moves away from.

        Raises:
            ConfigError: guidance has no condition, no text to move away from, and no temperature.
        """
        return block_conditions(self.config, labels, text, like, guidance, empty_text)

    def noise(
        self,
        count: int,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """Draw noise from the prior.

        Args:
            count: number of draws N.
            generator: one generator, or one per draw, which makes each draw independent of the others. Noise is drawn
                on the device of the generator, or on the CPU.
            grid: rows and columns of tokens, by default the ones of training.

        Returns:
            (N, C, H, W) float32 noise on the device of the weights.

        Raises:
            ConfigError: `count`, `generator` or `grid` is something else, or there are more or fewer generators than
                draws.
        """
        grid = self.config.grid if grid is None else grid
        if not isinstance(grid, Sequence) or len(grid) != 2:
            raise ConfigError(f"grid={grid!r}: expected (rows, columns)")
        rows, columns = (check_count(name, size) for name, size in zip(("grid: rows", "grid: columns"), grid))
        return self.images(self._noise(count, rows * columns, generator), (rows, columns))

    def denoise(
        self,
        x: torch.Tensor,
        labels: torch.Tensor | None = None,
        text: torch.Tensor | None = None,
        noise_std: float | None = None,
        factor: float = 1.0,
    ) -> torch.Tensor:
        """Take one step along the score: x + factor noise_std^2 grad log p(x) (arXiv 2412.06329, section 2.5).

        Args:
            x: (B, C, H, W) samples.
            labels: (B,) int64 classes, -1 for no class.
            text: (B, L, text_dim) text states.
            noise_std: standard deviation of the noise, by default the one of training.
            factor: factor of the step.

        Raises:
            ConfigError: `noise_std` or `factor` is not finite.
        """
        self._check_images(x)
        noise_std = self.config.noise_std if noise_std is None else noise_std
        for name, value in (("noise_std", noise_std), ("factor", factor)):
            if not math.isfinite(value):
                raise ConfigError(f"{name}={value}: expected a finite number")
        # Tensors of inference mode take no part in a backward pass; their clones outside it do.
        with torch.inference_mode(False), torch.enable_grad():
            x, text = x.detach().clone().requires_grad_(), None if text is None else text.clone()
            (score,) = torch.autograd.grad(self.log_prob(x, labels, text).sum(), x)
        return x.detach() + factor * noise_std**2 * score

    def grid(self, x: torch.Tensor) -> tuple[int, int]:
        """Rows and columns of tokens of images (B, C, H, W)."""
        return x.shape[2] // self.config.patch_size, x.shape[3] // self.config.patch_size

    def rotary(
        self, block: int, grid: tuple[int, int], like: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Cosine and sine of the rotary angles of a block, or (None, None).

        Args:
            block: index of the block.
            grid: rows and columns of tokens.
            like: tensor with the dtype and device of the result.
        """
        config = self.config
        if config.rotary == "none":
            return None, None
        text_len = config.text_len if config.text_dim and config.conditioned(block) else 0
        size = config.rotary_size or config.grid[0]
        key = grid, config.head_dim, size, text_len, bool(config.text_len)
        return rotary_table(key, torch.promote_types(like.dtype, torch.float32), like.device)
