"""Autoencoders of diffusers: loading, saving, encoding and decoding."""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, ConfigError
from ..io.files import located, write_atomically, writing

VAE_CONFIG = "config.json"


def autoencoder_class() -> Any:
    """Return the class AutoencoderKL of diffusers. Raises ConfigError if the package is missing."""
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise ConfigError("autoencoders need diffusers: pip install 'starflow-kernels[models]'") from None
    return AutoencoderKL


def vae_folder(folder: str | Path) -> Path:
    """Return the folder of an autoencoder, which may be the folder vae/ inside the given one.

    Args:
        folder: folder of an autoencoder or a pipeline.

    Raises:
        CheckpointError: there is no autoencoder.
    """
    folder = Path(folder)
    for path in (folder / "vae", folder):
        if (path / VAE_CONFIG).exists():
            return path
    raise CheckpointError(f"no autoencoder at {located(folder)} ({VAE_CONFIG} is not there)")


def load_vae(folder: str | Path, device: str | torch.device = "cpu") -> Any:
    """Load a float32 AutoencoderKL in eval mode.

    Args:
        folder: folder of an autoencoder in the layout of diffusers, or of a pipeline.
        device: device of the weights.

    Raises:
        CheckpointError: there is no autoencoder, or it is damaged.
        ConfigError: diffusers is not installed.
    """
    path = vae_folder(folder)
    if not any(path.glob("*.safetensors")):
        raise CheckpointError(f"{path}: not an autoencoder that diffusers reads (no weights in safetensors)")
    options = {"local_files_only": True, "torch_dtype": torch.float32, "use_safetensors": True, "disable_mmap": True}
    try:
        vae = autoencoder_class().from_pretrained(path, **options)
    except ConfigError:
        raise
    except Exception as error:
        # diffusers passes on the exceptions of its readers.
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: not an autoencoder that diffusers reads ({reason})") from None
    return vae.to(device).eval()


def save_vae(vae: Any, folder: Path, scaling_factor: float | None = None) -> None:
    """Write an autoencoder in the layout of diffusers; each file is written whole or not at all.

    Args:
        vae: the autoencoder.
        folder: folder to write.
        scaling_factor: scaling factor to store, by default the one of the autoencoder.

    Raises:
        StarflowError: the file system refuses.
    """
    folder = Path(folder)
    if scaling_factor is not None:
        vae.register_to_config(scaling_factor=scaling_factor)
    # The folder that it was read from is a path of this machine.
    vae.register_to_config(_name_or_path="")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".vae.") as temporary:
            vae.save_pretrained(temporary)
            # The configuration comes last, so that a folder with a configuration has its weights.
            for path in sorted(Path(temporary).iterdir(), key=lambda path: path.name == VAE_CONFIG):
                write_atomically(folder / path.name, functools.partial(shutil.copyfile, path))


def scale_images(images: torch.Tensor, levels: int, channels: int) -> torch.Tensor:
    """Scale integer gray levels to float32 images on [-1, 1].

    Args:
        images: (B, C, H, W) gray levels.
        levels: number of gray levels.
        channels: channels of the result; a gray image is repeated.
    """
    return (images.float() / (levels - 1) * 2 - 1).expand(-1, channels, -1, -1)


def downsampling(vae: Any) -> int:
    """Return the pixels per latent pixel along a side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


@torch.no_grad()
def posterior(vae: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode images (B, C, H, W) on [-1, 1]; return mean and standard deviation of the unscaled latents."""
    distribution = vae.encode(x).latent_dist
    return distribution.mean, distribution.std


def decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Decode scaled latents to images (B, C, H, W) on [-1, 1]."""
    return vae.decode(latents / vae.config.scaling_factor).sample
