"""Encoding of images to a cache of latents with text states. Each image and distinct caption is encoded once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from ..errors import ConfigError, DataError
from ..io.digests import digest
from ..io.files import check_writable, write_text
from ..io.tensors import save_tensors
from ..models.autoencoder import downsampling, load_vae, posterior, scale_images, vae_folder
from ..settings import check_types
from . import datasets
from .folders import is_ignored
from .latents import INDEX, SPLITS, CacheIndex, cache_path
from .prompts import encode_prompts, load_text, tokenize, warn_of_unknown_words

MODEL_SUFFIXES = {".json", ".safetensors", ".model", ".txt"}
TextDtype = Literal["float32", "bfloat16", "none"]


@dataclasses.dataclass(frozen=True)
class EncodeConfig:
    """Settings of a cache of latents.

    Args:
        data: images to encode.
        vae: folder of an autoencoder, or of a pipeline.
        text: folder with text_encoder/ and tokenizer/, such as that of a pipeline; empty for latents without text.
        length: length of the text states in tokens.
        text_dtype: dtype of the stored text states; "none" stores the tokens alone, for a text encoder that is trained
            along with the flow.
        rows_per_file: rows of a cache file.
    """

    data: datasets.DataConfig
    vae: str
    text: str = ""
    length: int = 128
    text_dtype: TextDtype = "float32"
    rows_per_file: int = 4096

    def __post_init__(self):
        check_types(self)
        for name in ("length", "rows_per_file"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected a positive integer")
        if self.data.crop != "center":
            raise ConfigError(f"data.crop={self.data.crop!r}: an image is encoded once, so take its center")

    def identity(self, captions: list[str]) -> dict[str, Any]:
        """Return the settings that determine a cache, with the state of the data and digests of the models.

        Args:
            captions: distinct captions of the images.
        """
        settings = {
            "data": dataclasses.asdict(self.data),
            "vae": folder_hash(vae_folder(Path(self.vae))),
            "rows_per_file": self.rows_per_file,
        }
        if files := datasets.data_state(self.data):
            settings["files"] = files
        if self.text:
            settings |= {
                "text_encoder": folder_hash(Path(self.text) / "text_encoder"),
                "tokenizer": folder_hash(Path(self.text) / "tokenizer"),
                "length": self.length,
                "text_dtype": self.text_dtype,
                "captions": digest("\0".join(captions).encode()),
            }
        return settings


@dataclasses.dataclass(frozen=True)
class EncodeReport:
    """Result of a call to `encode`.

    Args:
        written: cache files that the call wrote.
        found: cache files that were there before.
        index: index of the cache.
    """

    written: int
    found: int
    index: CacheIndex


def encode(
    config: EncodeConfig, folder: Path, device: str = "cpu", batch_size: int = 32, quiet: bool = False
) -> EncodeReport:
    """Fill a cache. An interrupted cache is continued at its first missing file, and a complete one is left as it is.

    Args:
        config: settings of the cache.
        folder: folder of the cache.
        device: torch device of the models.
        batch_size: images or captions per batch.
        quiet: whether to hide the progress bar.

    Raises:
        DataError: the folder holds a cache with other settings, or other safetensors files.
        StarflowError: the folder cannot be written.
    """
    folder = Path(folder)
    check_writable(folder)
    vae = load_vae(config.vae, device)
    splits = dict(zip(SPLITS, datasets.load(config.data)))
    if config.data.flip and config.data.source != "emoji":
        splits["train"] = datasets.mirrored(splits["train"])
    for images in splits.values():
        if len(images):
            datasets.check_autoencoder_input(vae, images, config.data.size)
    prompts = distinct_captions(splits.values()) if config.text else []
    tokenizer, text_encoder = load_text(config.text, device) if config.text else (None, None)
    side = config.data.size // downsampling(vae)
    index = CacheIndex(
        settings=_plain(config.identity(prompts)),
        counts={kind: len(images) for kind, images in splits.items()} | ({"text": len(prompts)} if prompts else {}),
        shape=(vae.config.latent_channels, side, side),
        scaling_factor=vae.config.scaling_factor,
        classes=splits["train"].classes,
        captions=len(splits["train"].captions(0)) if prompts else 0,
        text=(config.length, text_encoder.config.d_model) if prompts else None,
        complete=False,
    )
    _check_folder(folder, index)
    warn_of_unknown_words(prompts, tokenizer)
    rows = {prompt: row for row, prompt in enumerate(prompts)}
    written = found = 0
    bar = tqdm(total=sum(index.counts.values()), disable=quiet or None, unit="row")
    for kind, count in index.counts.items():
        for number, start in enumerate(range(0, count, config.rows_per_file)):
            part = range(start, min(start + config.rows_per_file, count))
            path = cache_path(folder, kind, number)
            if path.exists():
                found += 1
            else:
                batches = [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
                if kind == "text":
                    texts = [[prompts[i] for i in batch] for batch in batches]
                    tensors = {"tokens": torch.cat([tokenize(t, tokenizer, config.length) for t in texts])}
                    if config.text_dtype != "none":
                        states = [encode_prompts(t, tokenizer, text_encoder, config.length) for t in texts]
                        tensors["states"] = torch.cat(states).to(getattr(torch, config.text_dtype))
                else:
                    tensors = _encode_images(vae, splits[kind], batches, rows)
                save_tensors(tensors, path)
                written += 1
            bar.update(len(part))
    bar.close()
    index = dataclasses.replace(index, complete=True)
    write_text(folder / INDEX, index.dumps())
    return EncodeReport(written, found, index)


def folder_hash(folder: Path) -> str:
    """Return a SHA-256 of the files of a model, without the files of a training run in the same folder.

    Args:
        folder: folder of the model.
    """
    paths = [path for path in sorted(folder.glob("*")) if path.suffix in MODEL_SUFFIXES and not is_ignored(path.name)]
    return digest(*(part for path in paths for part in (path.name.encode(), path)))


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
        "captions": torch.tensor(captions, dtype=torch.int64, device="cpu").reshape(len(indices), -1),
    }


def distinct_captions(splits: Iterable[datasets.ImageSet]) -> list[str]:
    """Return the empty prompt, then the distinct captions in sorted order.

    Args:
        splits: image sets.
    """
    captions = {text for images in splits for i in range(len(images)) for text in images.captions(i)}
    return ["", *sorted(captions - {""})]


def _check_folder(folder: Path, index: CacheIndex) -> None:
    """Write the index of a new cache, or refuse a folder that holds another one."""
    if not (folder / INDEX).exists():
        if any(folder.glob("*.safetensors")):
            raise DataError(f"{folder} holds files of something else: choose another folder for the cache")
        write_text(folder / INDEX, index.dumps())
        return
    there = CacheIndex.load(folder)
    for name in sorted(there.settings.keys() | index.settings.keys()):
        old, new = there.settings.get(name), index.settings.get(name)
        if old != new and isinstance(old, dict) and isinstance(new, dict):
            k = next(k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k))
            name, old, new = f"{name}.{k}", old.get(k), new.get(k)
        if old is None and new is not None:
            other = "with other settings or by another version of this package"
            raise DataError(f"{folder} was made {other}, without {name}: choose another folder for the cache")
        if old != new:
            raise DataError(f"{folder} was made with {name}={old}, not {new}: choose another folder for the cache")
    if there.counts != index.counts:
        raise DataError(f"{folder} was made of {there.counts} rows, the data now has {index.counts}")


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings after a round trip through JSON."""
    return {
        k: _plain(v) if isinstance(v, dict) else list(v) if isinstance(v, tuple) else v for k, v in settings.items()
    }
