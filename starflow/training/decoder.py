"""Fine-tuning an autoencoder's decoder on noisy latents, in place of denoising them (arXiv 2506.06276)."""

from __future__ import annotations

import dataclasses
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import datasets
from ..errors import ConfigError
from ..models.autoencoder import decode, load_vae, posterior, save_vae, scale_images
from ..settings import read_sections, section
from .autoencoder import check_images, first_images, load_module, save_pairs
from .discriminator import PatchDiscriminator, hinge_loss
from .loop import Loop, LoopConfig

SHOWN_IMAGES = 16


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """What is trained, and the weights of its loss: mean square, perceptual distance, discriminator.

    vae: folder of the autoencoder, or of a pipeline. noise_std: of the Gaussian noise on the scaled latents, the
    flow's. lpips_weight: of LPIPS (arXiv 1801.03924), which needs the package lpips and the weights of VGG-16 in
    torch's hub folder; where they are not at hand it is left out with a warning. gan_weight: of the patch
    discriminator, from step gan_start on. gan_channels, gan_layers: its width and strided convolutions.
    """

    vae: str
    noise_std: float = 0.3
    lpips_weight: float = 0.1
    gan_weight: float = 0.05
    gan_start: int = 0
    gan_channels: int = 64
    gan_layers: int = 3

    def __post_init__(self):
        for field in dataclasses.fields(self)[1:]:
            value, low = getattr(self, field.name), 1 if field.name in ("gan_channels", "gan_layers") else 0
            kind = int if field.type == "int" else (int, float)
            if not isinstance(value, kind) or isinstance(value, bool) or not low <= value < math.inf:
                raise ConfigError(f"decoder: {field.name}={value!r}: expected a number of at least {low}")


@dataclasses.dataclass(frozen=True)
class DecoderRunConfig:
    """Everything that determines the fine-tuning of a decoder."""

    decoder: DecoderConfig
    data: datasets.DataConfig
    training: LoopConfig

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> DecoderRunConfig:
        """Config of nested mappings; unknown or missing settings raise a ConfigError that names them."""
        kinds = {"decoder": DecoderConfig, "data": datasets.DataConfig, "training": LoopConfig}
        return cls(**read_sections(settings, {name: section(kind) for name, kind in kinds.items()}))

    def to_dict(self) -> dict[str, Any]:
        """Nested plain mappings."""
        return dataclasses.asdict(self)


class DecoderTrainer(Loop):
    """A run in a folder, which is an AutoencoderKL in the diffusers layout, its encoder as it was."""

    CONFIG = DecoderRunConfig
    COMMAND = "train-decoder"

    def __init__(self, config: DecoderRunConfig, folder: Path, device: str = "cpu", tensorboard: bool = False):
        super().__init__(config, folder, device, tensorboard)
        settings, training = config.decoder, config.training
        self.vae = load_vae(settings.vae, device)
        check_images(self.vae, self.images, config.data.size)
        torch.manual_seed(training.seed)
        channels = self.vae.config.in_channels
        self.discriminator = PatchDiscriminator(channels, settings.gan_channels, settings.gan_layers).to(device)
        self.perceptual = load_lpips(device) if settings.lpips_weight else None
        self.vae.requires_grad_(False)
        self.trained = [self.vae.decoder, *filter(None, [self.vae.post_quant_conv])]
        weights = [parameter for module in self.trained for parameter in module.requires_grad_(True).parameters()]
        options = {"lr": training.learning_rate, "weight_decay": training.weight_decay, "fused": True}
        options["betas"] = training.beta1, training.beta2
        self.optimizer = torch.optim.AdamW(weights, **options)
        self.discriminator_optimizer = torch.optim.AdamW(self.discriminator.parameters(), **options)

    def train_step(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """One step of the decoder, then one of the discriminator; the random numbers belong to the step's number."""
        training, settings = self.config.training, self.config.decoder
        random = datasets.generator(training.seed, self.step, 1)
        x = self._images(images)
        rate = self.set_learning_rate(self.optimizer, self.discriminator_optimizer)
        decoded = decode(self.vae, self._noisy_latents(x, random))
        square = (decoded - x).square().mean()
        loss, metrics = square, {"step": self.step + 1, "square": square.item()}
        if self.perceptual is not None:
            perceptual = self.perceptual(decoded, x).mean()
            loss, metrics["lpips"] = loss + settings.lpips_weight * perceptual, perceptual.item()
        adversarial = settings.gan_weight > 0 and self.step >= settings.gan_start
        if adversarial:
            self.discriminator.requires_grad_(False)
            loss = loss - settings.gan_weight * self.discriminator(decoded).mean()
            self.discriminator.requires_grad_(True)
        self.check_finite(loss)
        metrics["gradient_norm"] = self._step(self.optimizer, loss)
        if adversarial:
            loss = hinge_loss(self.discriminator(x), self.discriminator(decoded.detach()))
            self.check_finite(loss)
            self._step(self.discriminator_optimizer, loss)
            metrics["discriminator"] = loss.item()
        self.step += 1
        return {**metrics, "learning_rate": rate}

    @torch.no_grad()
    def save_samples(self) -> None:
        """Write a grid of images above what is decoded from their noisy latents."""
        x = self._images(first_images(self.images, SHOWN_IMAGES))
        latents = self._noisy_latents(x, datasets.generator(self.config.training.seed))
        save_pairs(x, decode(self.vae, latents), self.folder / "samples" / f"{self.step:07d}.png")

    def save_weights(self) -> None:
        """Write the autoencoder."""
        save_vae(self.vae, self.folder)

    def state(self) -> dict[str, Any]:
        """Weights of both networks and their optimisers' moments."""
        return {
            "vae": self.vae.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "discriminator_optimizer": self.discriminator_optimizer.state_dict(),
        }

    def load_state(self, state: dict[str, Any], source: Path) -> None:
        """Take back what `state` gave."""
        load_module(self.vae, state["vae"], source)
        load_module(self.discriminator, state["discriminator"], source)
        self.optimizer.load_state_dict(state["optimizer"])
        self.discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])

    def _images(self, images: torch.Tensor) -> torch.Tensor:
        return scale_images(images, self.images.levels, self.vae.config.in_channels).to(self.device)

    def _noisy_latents(self, x: torch.Tensor, random: torch.Generator) -> torch.Tensor:
        mean, std = (moment * self.vae.config.scaling_factor for moment in posterior(self.vae, x))
        noise = torch.randn(mean.shape, generator=random).to(self.device)
        return mean + (std.square() + self.config.decoder.noise_std**2).sqrt() * noise

    def _step(self, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> float:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        weights = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = nn.utils.clip_grad_norm_(weights, self.config.training.clip or math.inf)
        optimizer.step()
        return norm.item()


def load_lpips(device: str | torch.device) -> nn.Module | None:
    """LPIPS on VGG-16 for images on [-1, 1]; None with a warning where its weights are not on this machine."""
    if not list((Path(torch.hub.get_dir()) / "checkpoints").glob("vgg16-*.pth")):
        # lpips would download them.
        return _without_lpips("VGG-16's weights are not in torch's hub folder")
    try:
        from lpips import LPIPS
    except ImportError:
        return _without_lpips("the package lpips is not installed")
    return LPIPS(net="vgg", verbose=False).to(device).eval().requires_grad_(False)


def _without_lpips(reason: str) -> None:
    warnings.warn(f"training without LPIPS: {reason}", stacklevel=3)
