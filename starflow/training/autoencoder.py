"""Training of a small AutoencoderKL (arXiv 1312.6114, 2112.10752), on whose latents a flow can be trained."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from ..data.datasets import DataConfig, ImageSet, check_autoencoder_input, to_pixels
from ..data.reading import readable_row
from ..errors import ConfigError
from ..io.images import save_grid
from ..models.autoencoder import autoencoder_class, posterior, save_vae, scale_images
from ..seeds import normal
from ..settings import check_types
from .config import LoopConfig, RunConfig
from .defaults import standard_defaults
from .loop import Loop

Loss = Literal["l1", "l2"]
# Number of images that determine the scaling factor.
SCALE_IMAGES = 512
# Number of images in a sample grid.
SHOWN_IMAGES = 16
BATCH = 64


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Shape and loss of an autoencoder.

    Args:
        channels: channels of the images.
        latent_channels: channels of the latents.
        block_channels: width at each resolution; each resolution after the first halves the side.
        layers: residual blocks per resolution.
        groups: groups of the group norms.
        loss: reconstruction loss, "l1" or "l2".
        kl_weight: weight of the divergence of the posterior from N(0, 1). Both loss terms are means over dimensions.
    """

    channels: int = 3
    latent_channels: int = 4
    block_channels: tuple[int, ...] = (32, 64, 64, 64)
    layers: int = 1
    groups: int = 8
    loss: Loss = "l1"
    kl_weight: float = 1e-4

    def __post_init__(self):
        check_types(self)
        numbers = [self.channels, self.latent_channels, self.layers, self.groups, *self.block_channels]
        if min(numbers) < 1 or not self.block_channels:
            raise ConfigError("channels, layers and groups are positive integers")
        if any(n % self.groups for n in self.block_channels):
            raise ConfigError(f"groups={self.groups} does not divide each of {list(self.block_channels)}")
        if not 0 <= self.kl_weight < math.inf:
            raise ConfigError(f"kl_weight={self.kl_weight} is not a finite number of at least 0")

    def build(self, size: int):
        """Return an AutoencoderKL with random weights.

        Args:
            size: width and height of the images in pixels.
        """
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
class AutoencoderRunConfig(RunConfig):
    """Settings that determine the training of an autoencoder."""

    autoencoder: AutoencoderConfig
    data: DataConfig
    training: LoopConfig


class AutoencoderTrainer(Loop):
    """Training run of an autoencoder. Its folder is an AutoencoderKL in the diffusers layout."""

    CONFIG = AutoencoderRunConfig
    COMMAND = "train-autoencoder"

    def __init__(self, config: AutoencoderRunConfig, folder: Path, device: str = "cpu", loggers: Collection[str] = ()):
        super().__init__(config, folder, device, loggers)
        torch.manual_seed(config.training.seed)
        with standard_defaults():
            self.vae = config.autoencoder.build(config.data.size).to(device)
        check_autoencoder_input(self.vae, self.images, config.data.size)
        self.optimizer = self.add_optimizer(self.vae.parameters())

    def train_step(self, random: torch.Generator, *batch: torch.Tensor) -> dict[str, float]:
        """Take one optimizer step on reconstruction and divergence."""
        config = self.config.autoencoder
        x = self._scaled(batch[0])
        with self.autocast():
            encoded = self.vae.encode(x).latent_dist
        # Noise and divergence are computed in float32.
        distribution = type(encoded)(encoded.parameters.float())
        noise = normal(distribution.mean.shape, random).to(self.device)
        with self.autocast():
            decoded = self.vae.decode(distribution.mean + distribution.std * noise).sample
        difference = decoded.float() - x
        reconstruction = difference.abs().mean() if config.loss == "l1" else difference.square().mean()
        divergence = distribution.kl().mean() / distribution.mean[0].numel()
        loss = reconstruction + config.kl_weight * divergence
        norm = self.descend(self.optimizer, self.vae.parameters(), [loss]).norm
        return {"reconstruction": reconstruction.item(), "divergence": divergence.item(), "gradient_norm": norm}

    def parts(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        """Return the autoencoder and its optimizer."""
        return {"vae": self.vae, "optimizer": self.optimizer}

    @torch.no_grad()
    def save_samples(self, path: Path) -> None:
        """Write a grid of images above their reconstructions."""
        x = self._scaled(first_images(self.images, SHOWN_IMAGES))
        mean, _ = posterior(self.vae, x)
        save_pairs(x, self.vae.decode(mean).sample, path)

    def save_weights(self) -> None:
        """Write the autoencoder, with the scaling factor that gives its latents a standard deviation of one."""
        save_vae(self.vae, self.folder, 1 / self._latent_std())

    def _scaled(self, images: torch.Tensor) -> torch.Tensor:
        return scale_images(images, self.images.levels, self.config.autoencoder.channels).to(self.device)

    def _latent_std(self) -> float:
        images = first_images(self.images, SCALE_IMAGES)
        moments = [posterior(self.vae, self._scaled(part)) for part in images.split(BATCH)]
        mean, std = (torch.cat(parts).double() for parts in zip(*moments))
        return math.sqrt(mean.var(correction=0) + std.square().mean())


def first_images(images: ImageSet, count: int) -> torch.Tensor:
    """Return uint8 (count, C, H, W) images, spread evenly over the set.

    Args:
        images: images to choose from.
        count: number of images; a smaller set returns all of its images.
    """
    count = min(count, len(images))
    return torch.stack([readable_row(images, i * len(images) // count)[0] for i in range(count)])


def save_pairs(x: torch.Tensor, decoded: torch.Tensor, path: Path) -> None:
    """Write a grid in which a row of images is followed by a row of their reconstructions.

    Args:
        x: (B, C, H, W) images on [-1, 1].
        decoded: reconstructions of the same shape.
        path: PNG file to write.
    """
    columns = min(8, len(x))
    rows = [part for pair in zip(x.split(columns), decoded.split(columns)) for part in pair if len(part) == columns]
    save_grid(to_pixels(torch.cat(rows), 256, 1.0), path, columns)
