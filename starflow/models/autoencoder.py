"""Autoencoders of the diffusers library: load, save whole or not at all, and what depends on their scaling factor."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, ConfigError, StarflowError

VAE_CONFIG = "config.json"


def autoencoder_class():
    """diffusers' AutoencoderKL; ConfigError where the package is missing."""
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise ConfigError("autoencoders need diffusers: pip install starflow-kernels[models]") from None
    return AutoencoderKL


def vae_folder(folder: Path) -> Path:
    """Folder of an autoencoder, which may be that of a pipeline with a vae/ inside."""
    folder = Path(folder)
    for path in (folder / "vae", folder):
        if (path / VAE_CONFIG).exists():
            return path
    raise CheckpointError(f"no autoencoder at {folder} ({VAE_CONFIG} is not there)")


def load_vae(folder: str | Path, device: str | torch.device = "cpu"):
    """float32 AutoencoderKL in eval mode of a folder in the diffusers layout, or of a pipeline's."""
    path = vae_folder(folder)
    try:
        vae = autoencoder_class().from_pretrained(path, local_files_only=True, torch_dtype=torch.float32)
    except ConfigError:
        raise
    except Exception as error:
        # diffusers raises whatever its readers do.
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: not an autoencoder that diffusers reads ({reason})") from None
    return vae.to(device).eval()


def save_vae(vae: Any, folder: Path, scaling_factor: float | None = None) -> None:
    """Write an autoencoder in the diffusers layout, each file whole or not at all."""
    folder = Path(folder)
    if scaling_factor is not None:
        vae.register_to_config(scaling_factor=scaling_factor)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".vae.") as temporary:
            vae.save_pretrained(temporary)
            # The configuration last: a folder with one has its weights.
            for path in sorted(Path(temporary).iterdir(), key=lambda path: path.name == VAE_CONFIG):
                path.chmod(0o644)
                os.replace(path, folder / path.name)
    except (OSError, RuntimeError) as error:
        raise StarflowError(f"cannot write {folder}: {getattr(error, 'strerror', None) or error}") from None


def scale_images(images: torch.Tensor, levels: int, channels: int) -> torch.Tensor:
    """float32 images on [-1, 1] of integer grey levels; a grey image is repeated over the channels."""
    return (images.float() / (levels - 1) * 2 - 1).expand(-1, channels, -1, -1)


def downsampling(vae: Any) -> int:
    """Pixels of an image a pixel of its latent."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


@torch.no_grad()
def posterior(vae: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the latents of images (B, C, H, W) on [-1, 1], unscaled."""
    distribution = vae.encode(x).latent_dist
    return distribution.mean, distribution.std


def decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Images (B, C, H, W) on [-1, 1] of scaled latents."""
    return vae.decode(latents / vae.config.scaling_factor).sample
