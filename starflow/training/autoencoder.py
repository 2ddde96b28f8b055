"""Training a small AutoencoderKL (arXiv 1312.6114, 2112.10752) for the latents of a flow."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from starflow_kernels.spec import check_choice

from ..data import datasets
from ..errors import CheckpointError, ConfigError
from ..models.autoencoder import autoencoder_class, downsampling, posterior, save_vae, scale_images
from ..sampling.sample import save_grid
from ..settings import read_sections, section
from .loop import Loop, LoopConfig

Loss = Literal["l1", "l2"]
# Images that the scaling factor is measured on, and that a sample grid shows.
SCALE_IMAGES, SHOWN_IMAGES, BATCH = 512, 16, 64


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Shape and loss of an autoencoder.

    channels: of the images. latent_channels: of the latents. block_channels: width at each resolution; all but the
    first halve it. layers: residual blocks a resolution. groups: of its group norms. loss: "l1" or "l2" of the
    reconstruction. kl_weight: of the divergence of the posterior from N(0, 1), both a mean over their own dimensions.
    """

    channels: int = 3
    latent_channels: int = 4
    block_channels: tuple[int, ...] = (32, 64, 64, 64)
    layers: int = 1
    groups: int = 8
    loss: Loss = "l1"
    kl_weight: float = 1e-4

    def __post_init__(self):
        numbers = [self.channels, self.latent_channels, self.layers, self.groups, *self.block_channels]
        if not all(isinstance(n, int) and n >= 1 for n in numbers) or not self.block_channels:
            raise ConfigError("autoencoder: channels, layers and groups are positive integers")
        if any(n % self.groups for n in self.block_channels):
            raise ConfigError(f"autoencoder: groups={self.groups} does not divide each of {list(self.block_channels)}")
        if not isinstance(self.kl_weight, (int, float)) or not 0 <= self.kl_weight < math.inf:
            raise ConfigError(f"autoencoder: kl_weight={self.kl_weight!r} is not a finite number of at least 0")
        try:
            check_choice("loss", self.loss, Loss)
        except ValueError as error:
            raise ConfigError(f"autoencoder: {error}") from None
        object.__setattr__(self, "block_channels", tuple(self.block_channels))

    def build(self, size: int):
        """AutoencoderKL with random weights, of images `size` pixels wide and high."""
        levels = len(self.block_channels)
        return autoencoder_class()(
            in_channels=self.channels,
            out_channels=self.channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=self.block_channels,
            layers_per_block=self.layers,
            latent_channels=self.latent_channels,
            norm_num_groups=self.groups,
            sample_size=size,
            scaling_factor=1.0,
        )


@dataclasses.dataclass(frozen=True)
class AutoencoderRunConfig:
    """Everything that determines the training of an autoencoder."""

    autoencoder: AutoencoderConfig
    data: datasets.DataConfig
    training: LoopConfig

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> AutoencoderRunConfig:
        """Config of nested mappings; unknown or missing settings raise a ConfigError that names them."""
        kinds = {"autoencoder": AutoencoderConfig, "data": datasets.DataConfig, "training": LoopConfig}
        return cls(**read_sections(settings, {name: section(kind) for name, kind in kinds.items()}))

    def to_dict(self) -> dict[str, Any]:
        """Nested plain mappings."""
        return dataclasses.asdict(self)


class AutoencoderTrainer(Loop):
    """A run of an autoencoder in a folder, which is an AutoencoderKL in the diffusers layout."""

    CONFIG = AutoencoderRunConfig
    COMMAND = "train-autoencoder"

    def __init__(self, config: AutoencoderRunConfig, folder: Path, device: str = "cpu", tensorboard: bool = False):
        super().__init__(config, folder, device, tensorboard)
        torch.manual_seed(config.training.seed)
        self.vae = config.autoencoder.build(config.data.size).to(device)
        check_images(self.vae, self.images, config.data.size)
        training = config.training
        self.optimizer = torch.optim.AdamW(
            self.vae.parameters(),
            lr=training.learning_rate,
            betas=(training.beta1, training.beta2),
            weight_decay=training.weight_decay,
            fused=True,
        )

    def train_step(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """One step on reconstruction and divergence; its random numbers belong to the step's number."""
        training, config = self.config.training, self.config.autoencoder
        random = datasets.generator(training.seed, self.step, 1)
        x = self._images(images)
        rate = self.set_learning_rate(self.optimizer)
        distribution = self.vae.encode(x).latent_dist
        noise = torch.randn(distribution.mean.shape, generator=random).to(self.device)
        difference = self.vae.decode(distribution.mean + distribution.std * noise).sample - x
        reconstruction = difference.abs().mean() if config.loss == "l1" else difference.square().mean()
        divergence = distribution.kl().mean() / distribution.mean[0].numel()
        loss = reconstruction + config.kl_weight * divergence
        self.check_finite(loss)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.vae.parameters(), training.clip or math.inf)
        self.optimizer.step()
        self.step += 1
        return {
            "step": self.step,
            "reconstruction": reconstruction.item(),
            "divergence": divergence.item(),
            "gradient_norm": norm.item(),
            "learning_rate": rate,
        }

    @torch.no_grad()
    def save_samples(self) -> None:
        """Write a grid of images above their reconstructions."""
        x = self._images(first_images(self.images, SHOWN_IMAGES))
        mean, _ = posterior(self.vae, x)
        save_pairs(x, self.vae.decode(mean).sample, self.folder / "samples" / f"{self.step:07d}.png")

    def save_weights(self) -> None:
        """Write the autoencoder; its scaling factor makes the standard deviation of the latents one."""
        save_vae(self.vae, self.folder, 1 / self._latent_std())

    def state(self) -> dict[str, Any]:
        """Weights and the optimiser's moments."""
        return {"vae": self.vae.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict[str, Any], source: Path) -> None:
        """Take back what `state` gave."""
        load_module(self.vae, state["vae"], source)
        self.optimizer.load_state_dict(state["optimizer"])

    def _images(self, images: torch.Tensor) -> torch.Tensor:
        return scale_images(images, self.images.levels, self.config.autoencoder.channels).to(self.device)

    def _latent_std(self) -> float:
        images = first_images(self.images, SCALE_IMAGES)
        moments = [posterior(self.vae, self._images(part)) for part in images.split(BATCH)]
        mean, std = (torch.cat(parts).double() for parts in zip(*moments))
        return math.sqrt(mean.var(correction=0) + std.square().mean())


def check_images(vae: Any, images: datasets.ImageSet, size: int) -> None:
    """Raise ConfigError unless images of this size go through an autoencoder."""
    if not images.levels:
        raise ConfigError("data: latents, but an autoencoder takes images")
    if size % downsampling(vae):
        raise ConfigError(f"data.size={size}: the autoencoder makes latents of 1/{downsampling(vae)} of the side")
    channels = images[0][0].shape[0]
    if channels not in (1, vae.config.in_channels):
        raise ConfigError(f"the autoencoder takes {vae.config.in_channels} channels, the images have {channels}")


def first_images(images: datasets.ImageSet, count: int) -> torch.Tensor:
    """uint8 (count, C, H, W) images, spread evenly over the set."""
    count = min(count, len(images))
    return torch.stack([images[i * len(images) // count][0] for i in range(count)])


def save_pairs(x: torch.Tensor, decoded: torch.Tensor, path: Path) -> None:
    """Write images on [-1, 1] as a PNG, a row of them above each row of what was decoded."""
    columns = min(8, len(x))
    rows = [part for pair in zip(x.split(columns), decoded.split(columns)) for part in pair if len(part) == columns]
    save_grid(datasets.quantise(torch.cat(rows), 256, 1.0), path, columns)


def load_module(module: nn.Module, state: dict[str, torch.Tensor], source: Path) -> None:
    """Load a state strictly; CheckpointError when its names or shapes are others."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{source} does not fit its settings: {str(error).splitlines()[-1].strip()}") from None
