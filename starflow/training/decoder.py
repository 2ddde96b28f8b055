"""Fine-tuning of an autoencoder's decoder on noisy latents, in place of denoising them (arXiv 2506.06276)."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Collection
from pathlib import Path

import torch
from torch import nn

from ..data.datasets import DataConfig, check_autoencoder_input
from ..errors import ConfigError
from ..models.autoencoder import decode, load_vae, posterior, save_vae, scale_images
from ..seeds import generator, normal
from ..settings import check_types
from .autoencoder import first_images, save_pairs
from .config import LoopConfig, RunConfig
from .defaults import standard_defaults
from .discriminator import PatchDiscriminator, hinge_loss
from .loop import Loop

SHOWN_IMAGES = 16


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Autoencoder to fine-tune, and its loss: mean squared error, perceptual distance and discriminator.

    Args:
        vae: folder of the autoencoder, or of a pipeline.
        noise_std: standard deviation of the Gaussian noise on the scaled latents. It should equal the flow's noise_std.
        lpips_weight: weight of LPIPS (arXiv 1801.03924). LPIPS needs the package lpips, and the weights of VGG-16 in
            torch's hub folder. Without them it is left out with a warning.
        gan_weight: weight of the patch discriminator.
        gan_start: first step with the discriminator, counted from 0.
        gan_channels: width of the discriminator.
        gan_layers: number of strided convolutions of the discriminator.
    """

    vae: str
    noise_std: float = 0.3
    lpips_weight: float = 0.1
    gan_weight: float = 0.05
    gan_start: int = 0
    gan_channels: int = 64
    gan_layers: int = 3

    def __post_init__(self):
        check_types(self)
        for field in dataclasses.fields(self)[1:]:
            value, low = getattr(self, field.name), 1 if field.name in ("gan_channels", "gan_layers") else 0
            if not low <= value < math.inf:
                raise ConfigError(f"{field.name}={value}: expected a number of at least {low}")


@dataclasses.dataclass(frozen=True)
class DecoderRunConfig(RunConfig):
    """Settings that determine the fine-tuning of a decoder."""

    decoder: DecoderConfig
    data: DataConfig
    training: LoopConfig


class DecoderTrainer(Loop):
    """Fine-tuning run of a decoder. Its folder is an AutoencoderKL in the diffusers layout; the encoder is kept."""

    CONFIG = DecoderRunConfig
    COMMAND = "train-decoder"

    def __init__(self, config: DecoderRunConfig, folder: Path, device: str = "cpu", loggers: Collection[str] = ()):
        super().__init__(config, folder, device, loggers)
        settings = config.decoder
        self.vae = load_vae(settings.vae, device)
        check_autoencoder_input(self.vae, self.images, config.data.size)
        torch.manual_seed(config.training.seed)
        channels = self.vae.config.in_channels
        with standard_defaults():
            self.discriminator = PatchDiscriminator(channels, settings.gan_channels, settings.gan_layers).to(device)
            self.perceptual = load_lpips(device) if settings.lpips_weight else None
        self.vae.requires_grad_(False)
        modules = [self.vae.decoder, *filter(None, [self.vae.post_quant_conv])]
        self.trained = [parameter for module in modules for parameter in module.requires_grad_(True).parameters()]
        self.optimizer = self.add_optimizer(self.trained)
        self.discriminator_optimizer = self.add_optimizer(self.discriminator.parameters())

    def train_step(self, random: torch.Generator, *batch: torch.Tensor) -> dict[str, float]:
        """Take one step of the decoder, then one of the discriminator."""
        settings = self.config.decoder
        x = self._scaled(batch[0])
        latents = self._noisy_latents(x, random)
        with self.autocast():
            decoded = decode(self.vae, latents).float()
        square = (decoded - x).square().mean()
        loss, metrics = square, {"square": square.item()}
        if self.perceptual is not None:
            perceptual = self.perceptual(decoded, x).mean()
            loss, metrics["lpips"] = loss + settings.lpips_weight * perceptual, perceptual.item()
        adversarial = settings.gan_weight > 0 and self.step >= settings.gan_start
        if adversarial:
            self.discriminator.requires_grad_(False)
            loss = loss - settings.gan_weight * self.discriminator(decoded).mean()
            self.discriminator.requires_grad_(True)
        metrics["gradient_norm"] = self.descend(self.optimizer, self.trained, [loss]).norm
        if adversarial:
            loss = hinge_loss(self.discriminator(x), self.discriminator(decoded.detach()))
            self.descend(self.discriminator_optimizer, self.discriminator.parameters(), [loss])
            metrics["discriminator"] = loss.item()
        return metrics

    def parts(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        """Return both networks and their optimizers."""
        return {
            "vae": self.vae,
            "discriminator": self.discriminator,
            "optimizer": self.optimizer,
            "discriminator_optimizer": self.discriminator_optimizer,
        }

    @torch.no_grad()
    def save_samples(self, path: Path) -> None:
        """Write a grid of images above the images decoded from their noisy latents."""
        x = self._scaled(first_images(self.images, SHOWN_IMAGES))
        latents = self._noisy_latents(x, generator(self.config.training.seed))
        save_pairs(x, decode(self.vae, latents), path)

    def save_weights(self) -> None:
        """Write the autoencoder."""
        save_vae(self.vae, self.folder)

    def _scaled(self, images: torch.Tensor) -> torch.Tensor:
        return scale_images(images, self.images.levels, self.vae.config.in_channels).to(self.device)

    def _noisy_latents(self, x: torch.Tensor, random: torch.Generator) -> torch.Tensor:
        mean, std = (moment * self.vae.config.scaling_factor for moment in posterior(self.vae, x))
        noise = normal(mean.shape, random).to(self.device)
        return mean + (std.square() + self.config.decoder.noise_std**2).sqrt() * noise


def load_lpips(device: str | torch.device) -> nn.Module | None:
    """Return LPIPS on VGG-16 for images on [-1, 1]. Warns and returns None if its weights are not on this machine.

    Args:
        device: torch device of the network.
    """
    if not list((Path(torch.hub.get_dir()) / "checkpoints").glob("vgg16-*.pth")):
        # lpips would download the weights otherwise.
        return _without_lpips("VGG-16's weights are not in torch's hub folder")
    try:
        from lpips import LPIPS
    except ImportError:
        return _without_lpips("the package lpips is not installed")
    return LPIPS(net="vgg", verbose=False).to(device).eval().requires_grad_(False)


def _without_lpips(reason: str) -> None:
    warnings.warn(f"training without LPIPS: {reason}", stacklevel=3)
