"""Images to cached latents, with the text states of their captions: each image and each caption goes through once."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from starflow_kernels.spec import check_choice

from ..errors import CheckpointError, ConfigError, DataError
from ..io.files import write_atomically, write_text
from ..models.autoencoder import downsampling, load_vae, posterior, scale_images, vae_folder
from . import datasets
from .latents import MANIFEST, SPLITS, Manifest, shard_path
from .prompts import encode_prompts

TextDtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class EncodeConfig:
    """What a cache is made of.

    vae: folder of an autoencoder or a pipeline. text: folder with text_encoder/ and tokenizer/, such as a pipeline's,
    empty for latents without text. length: of the text states in tokens. text_dtype: of the stored states.
    shard_size: rows of a shard.
    """

    data: datasets.DataConfig
    vae: str
    text: str = ""
    length: int = 128
    text_dtype: TextDtype = "float32"
    shard_size: int = 4096

    def __post_init__(self):
        for name in ("length", "shard_size"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected a positive integer")
        try:
            check_choice("text_dtype", self.text_dtype, TextDtype)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def identity(self, captions: list[str]) -> dict[str, Any]:
        """Settings that a cache depends on, models by the hashes of their files."""
        settings = {
            "data": dataclasses.asdict(self.data),
            "vae": folder_hash(vae_folder(Path(self.vae))),
            "shard_size": self.shard_size,
        }
        if self.text:
            settings |= {
                "text_encoder": folder_hash(Path(self.text) / "text_encoder"),
                "tokenizer": folder_hash(Path(self.text) / "tokenizer"),
                "length": self.length,
                "text_dtype": self.text_dtype,
                "captions": hashlib.sha256("\0".join(captions).encode()).hexdigest(),
            }
        return settings


@dataclasses.dataclass(frozen=True)
class EncodeReport:
    """Shards that this call wrote, those that were there already, and what the cache holds."""

    written: int
    found: int
    manifest: Manifest


def encode(
    config: EncodeConfig, folder: Path, device: str = "cpu", batch_size: int = 32, quiet: bool = False
) -> EncodeReport:
    """Fill a cache; one that was interrupted is continued at its first missing shard, a complete one left as it is.

    Raises DataError when the folder holds a cache of other settings, or shards without a manifest.
    """
    folder, vae = Path(folder), load_vae(config.vae, device)
    splits = dict(zip(SPLITS, datasets.load(config.data)))
    for images in splits.values():
        if len(images):
            datasets.check_autoencoder_input(vae, images, config.data.size)
    prompts = _distinct_captions(splits.values()) if config.text else []
    tokenizer, text_encoder = load_text(config.text, device) if config.text else (None, None)
    side = config.data.size // downsampling(vae)
    manifest = Manifest(
        settings=_plain(config.identity(prompts)),
        counts={kind: len(images) for kind, images in splits.items()} | ({"text": len(prompts)} if prompts else {}),
        shape=(vae.config.latent_channels, side, side),
        scaling_factor=vae.config.scaling_factor,
        classes=splits["train"].classes,
        captions=len(splits["train"].captions(0)) if prompts else 0,
        text=(config.length, text_encoder.config.d_model) if prompts else None,
        complete=False,
    )
    _check_folder(folder, manifest)
    rows = {prompt: row for row, prompt in enumerate(prompts)}
    written = found = 0
    bar = tqdm(total=sum(manifest.counts.values()), disable=quiet or None, unit="row")
    for kind, count in manifest.counts.items():
        for shard, start in enumerate(range(0, count, config.shard_size)):
            part = range(start, min(start + config.shard_size, count))
            path = shard_path(folder, kind, shard)
            if path.exists():
                found += 1
            else:
                batches = [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
                if kind == "text":
                    options = (tokenizer, text_encoder, config.length)
                    encoded = [encode_prompts([prompts[i] for i in batch], *options) for batch in batches]
                    tensors = {"states": torch.cat(encoded).to(getattr(torch, config.text_dtype))}
                else:
                    tensors = _encode_images(vae, splits[kind], batches, rows)
                _save(tensors, path)
                written += 1
            bar.update(len(part))
    bar.close()
    manifest = dataclasses.replace(manifest, complete=True)
    write_text(folder / MANIFEST, manifest.dumps())
    return EncodeReport(written, found, manifest)


def load_text(folder: str | Path, device: str | torch.device = "cpu") -> tuple[Any, Any]:
    """Tokenizer and T5EncoderModel of a folder with tokenizer/ and text_encoder/."""
    folder = Path(folder)
    try:
        from transformers import AutoTokenizer, T5EncoderModel
    except ImportError:
        raise ConfigError("captions need transformers: pip install starflow-kernels[models]") from None
    for name in ("tokenizer", "text_encoder"):
        if not (folder / name).is_dir():
            raise CheckpointError(f"no text encoder at {folder}: {folder / name} is not there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        text_encoder = T5EncoderModel.from_pretrained(folder / "text_encoder", local_files_only=True)
    except Exception as error:
        # transformers raises whatever its readers do.
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{folder}: not a text encoder that transformers reads ({reason})") from None
    return tokenizer, text_encoder.to(device).eval()


def folder_hash(folder: Path) -> str:
    """SHA-256 of the files of a model's folder, those of a training run beside them left out."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        if path.suffix in (".json", ".safetensors", ".model", ".txt"):
            digest.update(path.name.encode())
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def _encode_images(
    vae, images: datasets.ImageSet, batches: list[range], rows: dict[str, int]
) -> dict[str, torch.Tensor]:
    means, stds, device = [], [], next(vae.parameters()).device
    for batch in batches:
        pixels = torch.stack([images[i][0] for i in batch])
        moments = posterior(vae, scale_images(pixels, images.levels, vae.config.in_channels).to(device))
        mean, std = (moment.cpu() * vae.config.scaling_factor for moment in moments)
        means.append(mean)
        stds.append(std)
    indices = [i for batch in batches for i in batch]
    captions = [[rows[text] for text in images.captions(i)] for i in indices] if rows else [[] for _ in indices]
    return {
        "mean": torch.cat(means),
        "std": torch.cat(stds),
        "labels": images.labels[indices],
        "captions": torch.tensor(captions, dtype=torch.int64).reshape(len(indices), -1),
    }


def _distinct_captions(splits) -> list[str]:
    """The empty prompt, then each distinct caption, sorted."""
    captions = {text for images in splits for i in range(len(images)) for text in images.captions(i)}
    return ["", *sorted(captions - {""})]


def _check_folder(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a new cache, or refuse a folder that holds another one."""
    if not (folder / MANIFEST).exists():
        if any(folder.glob("*.safetensors")):
            raise DataError(f"{folder} holds files of something else: choose another folder for the cache")
        write_text(folder / MANIFEST, manifest.dumps())
        return
    there = Manifest.load(folder)
    for name in sorted(there.settings.keys() | manifest.settings.keys()):
        old, new = there.settings.get(name), manifest.settings.get(name)
        if old != new and isinstance(old, dict) and isinstance(new, dict):
            name, old, new = next((f"{name}.{k}", old.get(k), v) for k, v in new.items() if v != old.get(k))
        if old != new:
            raise DataError(f"{folder} was made with {name}={old}, not {new}: choose another folder for the cache")
    if there.counts != manifest.counts:
        raise DataError(f"{folder} was made of {there.counts} rows, the data now has {manifest.counts}")


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON gives them back."""
    return {
        k: _plain(v) if isinstance(v, dict) else list(v) if isinstance(v, tuple) else v for k, v in settings.items()
    }


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    def write(temporary: Path) -> None:
        try:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary)
        except SafetensorError as error:
            raise OSError(str(error)) from None

    write_atomically(path, write)
