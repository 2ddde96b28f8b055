"""The flow: TarFlow (arXiv 2412.06329) and STARFlow (arXiv 2506.06276) as one model."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from starflow_kernels.solver import Solver, SolveReport
from starflow_kernels.spec import GuidanceRule, Quantize, check_choice

from ..errors import ConfigError, InverseError
from .block import FlowBlock
from .checkpoint import from_pretrained, save_pretrained
from .config import FlowConfig
from .tokens import patchify, rotary_angles, unpatchify

if TYPE_CHECKING:
    from ..inversion.solvers import Calibration

PRIOR_RATE = 0.1
LOG_TWO_PI = math.log(2 * math.pi)


class FlowOutput(NamedTuple):
    """z: (B, C, H, W) noise in the layout of the images. logdet: (B,) log|det dz/dx|, nats. latents: (B, T, D) tokens
    after each block, the last of them z."""

    z: torch.Tensor
    logdet: torch.Tensor
    latents: list[torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Guidance of sampling.

    weight: 0 is plain sampling. rule: "tarflow" or "starflow", see `starflow_kernels.affine_flow_inverse`.
    annealed: the weight grows linearly over the tokens of a block, from 1/n of it at the first transformed token to
    all of it at the last. temperature: attention temperature of the branch without a condition; other than 1 it guides
    a model that has no condition.
    """

    weight: float = 0.0
    rule: GuidanceRule = "tarflow"
    annealed: bool = False
    temperature: float = 1.0

    def __post_init__(self):
        check_choice("rule", self.rule, GuidanceRule)
        if not 0 <= self.weight < math.inf:
            raise ConfigError(f"weight={self.weight}: expected a finite guidance weight >= 0")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature={self.temperature}: expected a finite attention temperature > 0")

    def weights(self, tokens: int, start: bool, device: torch.device) -> torch.Tensor:
        """(T,) weight of each token in the block's own order; without a start token, token 0 is not transformed."""
        steps = torch.arange(1, tokens + 1) if start else torch.arange(tokens)
        ramp = steps.double() / max(int(steps[-1]), 1) if self.annealed else torch.ones(tokens, dtype=torch.float64)
        return (self.weight * ramp).to(device)

    def options(self, tokens: int, start: bool, device: torch.device) -> dict[str, Any]:
        """What `FlowBlock.inverse` takes of it."""
        weights = self.weights(tokens, start, device)
        return {"guidance": weights, "rule": self.rule, "temperature": self.temperature}


class Flow(nn.Module):
    """Normalizing flow on images (B, C, H, W) scaled to [-1, 1], or on latents of an autoencoder.

    Both directions keep the layout of the images. Labels are int64 (B,), -1 for no class; text is (B, L, text_dim)
    states of a text encoder with padding set to zero.

    calibration: what was measured of its solvers (`starflow calibrate`), None for nothing; saved with the weights.
    """

    def __init__(self, config: FlowConfig):
        super().__init__()
        self.config = config
        self.calibration: Calibration | None = None
        self.blocks = nn.ModuleList(
            FlowBlock(config.block_spec(i), config.num_classes if config.conditioned(i) else 0)
            for i in range(len(config.layers))
        )
        rows, columns = config.grid
        if config.scale == "unit":
            self.register_buffer("prior_variance", torch.ones(rows * columns, config.token_dim))
        else:
            self.prior_variance = None

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> Flow:
        """Flow of a checkpoint folder, or of a bundled checkpoint by name ("digits"), in eval mode.

        dtype: dtype to convert the weights to; None keeps theirs. Raises CheckpointError.
        """
        return from_pretrained(cls, folder, device, dtype)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model.safetensors and config.json into a folder, each file whole or not at all, and the calibration."""
        save_pretrained(self, folder)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """(B, T, D) tokens of images (B, C, H, W)."""
        channels = self.config.image_channels
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(f"images: expected shape (B, {channels}, H, W), got {tuple(images.shape)}")
        size = self.config.image_size
        if self.config.rotary == "none" and images.shape[2:] != (size, size):
            height, width = images.shape[2:]
            raise ValueError(f"images of {height}x{width} pixels: this model takes {size}x{size}")
        return patchify(images, self.config.patch_size, self.config.patch_order)

    def images(self, tokens: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """(B, C, H, W) images of tokens (B, T, D) on a grid of (rows, columns), that of the config by default."""
        return unpatchify(tokens, grid or self.config.grid, self.config.patch_size, self.config.patch_order)

    def forward(
        self,
        x: torch.Tensor,
        labels: torch.Tensor | None = None,
        text: torch.Tensor | None = None,
        dropout: float = 0.0,
        backend: str | None = None,
    ) -> FlowOutput:
        """Data (B, C, H, W) to noise, all tokens at once; dropout: see `starflow_kernels.block_forward`."""
        self._check_context(labels, text, len(x))
        grid, tokens, contexts = self.grid(x), self.tokens(x), self.contexts(labels, text, x)
        logdet = tokens.new_zeros(len(x), dtype=torch.promote_types(x.dtype, torch.float32))
        latents = []
        for i, block in enumerate(self.blocks):
            rotary = self.rotary(i, grid, tokens)
            tokens, block_logdet = block(tokens, *contexts[i][0], rotary, dropout=dropout, backend=backend)
            logdet = logdet + block_logdet
            latents.append(tokens)
        return FlowOutput(self.images(tokens, grid), logdet, latents)

    def log_prob(
        self, x: torch.Tensor, labels: torch.Tensor | None = None, text: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B,) log density of x in nats."""
        _, logdet, latents = self(x, labels, text)
        z = latents[-1]
        variance = torch.ones_like(z[:1]) if self.prior_variance is None else self.prior_variance.to(z.dtype)
        return logdet - 0.5 * (z.square() / variance + variance.log() + LOG_TWO_PI).sum(dim=(1, 2))

    def loss(self, output: FlowOutput, latent_penalty: float = 0.0) -> torch.Tensor:
        """Negative log-likelihood a dimension without its constant: mean z^2 / 2 - logdet / dimensions.

        latent_penalty: weight of the mean squares of the inner blocks' latents (STARFlow: 1e-4).
        """
        z = output.latents[-1]
        loss = 0.5 * z.square().mean() - output.logdet.mean() / z[0].numel()
        return loss + latent_penalty * sum(latent.square().mean() for latent in output.latents[:-1])

    @torch.no_grad()
    def update_prior(self, z: torch.Tensor) -> None:
        """Move the prior's variance of a volume-preserving flow towards that of z (B, T, D)."""
        if self.prior_variance is not None:
            self.prior_variance.lerp_(z.square().mean(dim=0).to(self.prior_variance.dtype), PRIOR_RATE)

    @torch.no_grad()
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
        return_reports: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, list[SolveReport]]:
        """Noise (B, C, H, W) to data, or (data, what each block took) with return_reports, the reports in the order
        of `blocks`.

        empty_text: (B or 1, L, text_dim) states of the prompt that guidance moves away from, the empty one usually.
        progress: called now and then as progress(done, total) with the tokens of all blocks; what it raises ends the
        call. after_block: called as after_block(block, x) with what a block made, as images; returns what goes on.
        solvers: one for all blocks, or one a block in the order of `blocks`; see `starflow.solvers.Inversion`.
        quantize: weights of one byte, "int8" or "fp8", see `starflow_kernels.block_inverse`.
        Raises ConfigError when guidance is asked for and there is nothing to tell its two branches apart, InverseError,
        which names the block, where its noise or its data is not finite.
        """
        self._check_context(labels, text, len(z))
        grid, tokens = self.grid(z), self.tokens(z)
        contexts = self.contexts(labels, text, z, guidance, empty_text)
        count, each = len(self.blocks), tokens.shape[0] * tokens.shape[1]
        solvers = [solvers] * count if isinstance(solvers, Solver) else list(solvers)
        if len(solvers) != count:
            raise ValueError(f"solvers: {len(solvers)} of them for {count} blocks")
        reports: list[SolveReport | None] = []
        for i in reversed(range(count)):
            block, (context, guided) = self.blocks[i], contexts[i]
            options = guidance.options(tokens.shape[1], block.spec.start, z.device) if guided else {}
            if progress:
                before = (count - 1 - i) * each
                options["progress"] = lambda done, _, before=before: progress(before + done, count * each)
            options.update(solver=solvers[i], quantize=quantize, return_report=return_reports, backend=backend)
            try:
                made = block.inverse(tokens, *context, self.rotary(i, grid, tokens), **options)
            except ValueError as error:
                # Its subclasses are those of a callback.
                if type(error) is not ValueError:
                    raise
                if i + 1 < count:
                    self._check_finite(i + 1, tokens)
                raise InverseError(f"block {i}: {error}") from error
            tokens, report = made if return_reports else (made, None)
            reports.insert(0, report)
            if progress:
                progress((count - i) * each, count * each)
            if after_block:
                tokens = self.tokens(after_block(i, self.images(tokens, grid)))
        self._check_finite(0, tokens)
        x = self.images(tokens, grid)
        return (x, reports) if return_reports else x

    def _check_finite(self, block: int, tokens: torch.Tensor) -> None:
        """Raise InverseError where what a block made is not finite."""
        if not tokens.numel() or math.isfinite(torch.linalg.vector_norm(tokens, math.inf).item()):
            return
        own = tokens.flip(1) if self.blocks[block].spec.flip else tokens
        sample, token, _ = own.isfinite().logical_not().nonzero()[0].tolist()
        raise InverseError(f"block {block}: values are not finite at token {token} of sample {sample}")

    def contexts(
        self,
        labels: torch.Tensor | None,
        text: torch.Tensor | None,
        like: torch.Tensor,
        guidance: Guidance = Guidance(),
        empty_text: torch.Tensor | None = None,
    ) -> list[tuple[tuple[torch.Tensor | None, torch.Tensor | None], bool]]:
        """What each block is told: (class weights, text), and whether guidance acts on it.

        Where it does these have 2B rows, first the B with the condition. Raises ConfigError as `inverse` does.
        """
        classes, conditional = self._class_weights(labels, like), labels is not None or text is not None
        plain = guided = classes, text
        if guidance.weight:
            if not conditional and guidance.temperature == 1:
                raise ConfigError("guidance: needs labels, text, or an attention temperature other than 1")
            if text is not None and empty_text is None:
                raise ConfigError("guidance: text needs empty_text, the states of the empty prompt")
            guided = (
                None if classes is None else torch.cat([classes, self._class_weights(None, like)]),
                None if text is None else torch.cat([text, empty_text.expand_as(text)]),
            )
        found = []
        for i in range(len(self.blocks)):
            reached = self.config.conditioned(i)
            acts = bool(guidance.weight) and (reached or not conditional)
            found.append(((guided if acts else plain) if reached else (None, None), acts))
        return found

    def noise(
        self,
        count: int,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """(count, C, H, W) float32 draws of the prior, on a grid of (rows, columns) tokens.

        generator: one for all, or one a draw, which then does not depend on the others. Drawn on the device of the
        first, the CPU without one, and returned on that of the weights.
        """
        rows, columns = grid or self.config.grid
        shape = (count, rows * columns, self.config.token_dim)
        if isinstance(generator, Sequence):
            if len(generator) != count:
                raise ValueError(f"generator: {len(generator)} of them for {count} draws")
            z = torch.empty(shape, device=generator[0].device if count else "cpu")
            for row, each in zip(z, generator):
                row.normal_(generator=each)
        else:
            z = torch.randn(shape, generator=generator, device=generator.device if generator else "cpu")
        z = z.to(self.device)
        if self.prior_variance is not None:
            z = z * self.prior_variance.sqrt()
        return self.images(z, (rows, columns))

    def denoise(
        self,
        x: torch.Tensor,
        labels: torch.Tensor | None = None,
        text: torch.Tensor | None = None,
        noise_std: float | None = None,
        factor: float = 1.0,
    ) -> torch.Tensor:
        """One step along the score: x + factor noise_std^2 grad log p(x) (arXiv 2412.06329, section 2.5).

        noise_std: that of training by default.
        """
        noise_std = self.config.noise_std if noise_std is None else noise_std
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (score,) = torch.autograd.grad(self.log_prob(x, labels, text).sum(), x)
        return x.detach() + factor * noise_std**2 * score

    def grid(self, x: torch.Tensor) -> tuple[int, int]:
        """Rows and columns of tokens of images (B, C, H, W)."""
        return x.shape[2] // self.config.patch_size, x.shape[3] // self.config.patch_size

    def _check_context(self, labels: torch.Tensor | None, text: torch.Tensor | None, rows: int) -> None:
        config = self.config
        for name, value, wanted in (("labels", labels, config.num_classes), ("text", text, config.text_dim)):
            if value is not None and not wanted:
                raise ValueError(f"{name}: given, but the model has no such condition")
            if value is not None and len(value) != rows:
                raise ValueError(f"{name}: {len(value)} rows, expected {rows}")
        if config.text_dim and (text is None or text.shape[1:] != (config.text_len, config.text_dim)):
            given = "none" if text is None else tuple(text.shape)
            raise ValueError(f"text: expected states (B, {config.text_len}, {config.text_dim}), got {given}")
        if labels is not None and not torch.compiler.is_compiling():
            low, high = labels.aminmax()
            if low < -1 or high >= config.num_classes:
                raise ValueError(f"labels: expected -1 (no class) .. {config.num_classes - 1}, got {labels.tolist()}")

    def _class_weights(self, labels: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
        """(B, num_classes) weights of the class embeddings: a one, or all equal for no class."""
        classes = self.config.num_classes
        if not classes:
            return None
        mean = like.new_full((len(like), classes), 1 / classes)
        if labels is None:
            return mean
        one = torch.nn.functional.one_hot(labels.clamp(min=0), classes).to(mean.dtype)
        return torch.where(labels.unsqueeze(1) < 0, mean, one)

    def rotary(self, block: int, grid: tuple[int, int], like: torch.Tensor):
        """cos and sin of a block's rotary angles on a grid, or Nones."""
        config = self.config
        if config.rotary == "none":
            return None, None
        text_len = config.text_len if config.text_dim and config.conditioned(block) else 0
        size = config.rotary_size or config.grid[0]
        key = grid, config.head_dim, size, text_len, bool(config.text_len)
        table = _rotary_table.__wrapped__ if torch.compiler.is_compiling() else _rotary_table
        return table(key, torch.promote_types(like.dtype, torch.float32), like.device)


@functools.lru_cache(maxsize=32)
def _rotary_table(key, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    angles = rotary_angles(*key)
    return angles.cos().to(dtype=dtype, device=device), angles.sin().to(dtype=dtype, device=device)
