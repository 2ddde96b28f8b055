"""Cached latents of an autoencoder with the text states of their captions: what `starflow encode` writes.

A cache is a folder of safetensors shards with a manifest beside them. A shard of images holds `mean` and `std` of the
autoencoder's posterior, scaled, (n, C, h, w); `labels` (n,); and `captions` (n, K), rows of the text shards' `states`
(m, length, text_dim). Row 0 of those is the empty prompt.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.utils.data import Dataset

from ..errors import DataError

MANIFEST = "manifest.json"
FORMAT = 1
SPLITS = ("train", "held_out")
EMPTY_PROMPT = 0


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a cache holds and what it was made of.

    settings: all that determines it, data, models by their hashes, and shard size. counts: rows by kind of shard
    ("train", "held_out", "text"). shape: (C, h, w) of a latent. scaling_factor: of the autoencoder, applied already.
    captions: of an image, 0 for none. text: (length, text_dim) of the states, None without a text encoder.
    complete: whether every shard is there.
    """

    settings: dict[str, Any]
    counts: dict[str, int]
    shape: tuple[int, int, int]
    scaling_factor: float
    classes: tuple[str, ...]
    captions: int
    text: tuple[int, int] | None
    complete: bool
    format: int = FORMAT

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Manifest of a cache; DataError when there is none or it is not one of this format."""
        path = Path(folder) / MANIFEST
        try:
            fields = json.loads(path.read_text())
            if fields.get("format") != FORMAT:
                raise DataError(f"{path}: format {fields.get('format')}, this version reads {FORMAT}")
            for name in ("shape", "classes", "text"):
                fields[name] = None if fields[name] is None else tuple(fields[name])
            return cls(**fields)
        except FileNotFoundError:
            raise DataError(
                f"no cached latents at {folder} ({MANIFEST} is not there): starflow encode makes them"
            ) from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not a manifest of cached latents ({error})") from None

    def dumps(self) -> str:
        """JSON that `load` reads."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @property
    def shard_size(self) -> int:
        """Rows of a shard, but for the last of its kind."""
        return self.settings["shard_size"]


def shard_path(folder: Path, kind: str, shard: int) -> Path:
    """File of a shard."""
    return Path(folder) / f"{kind}-{shard:05d}.safetensors"


class Shards:
    """Rows of the tensors in the shards of one kind, read where they lie."""

    def __init__(self, folder: Path, kind: str, count: int, shard_size: int):
        self.folder, self.kind, self.count, self.shard_size = Path(folder), kind, count, shard_size
        self._opened: dict[tuple[int, str], Any] = {}
        for shard in range(-(-count // shard_size)):
            if not shard_path(folder, kind, shard).exists():
                raise DataError(f"{shard_path(folder, kind, shard)} is missing: starflow encode writes it anew")

    def __getstate__(self) -> dict[str, Any]:
        # Open files stay in their process.
        return {**self.__dict__, "_opened": {}}

    def row(self, name: str, index: int) -> torch.Tensor:
        """Row of a tensor."""
        shard, row = divmod(index, self.shard_size)
        return self._slice(shard, name)[row]

    def column(self, name: str) -> torch.Tensor:
        """All rows of a small tensor."""
        return torch.cat([self._slice(shard, name)[:] for shard in range(-(-self.count // self.shard_size))])

    def _slice(self, shard: int, name: str):
        if (shard, name) not in self._opened:
            path = shard_path(self.folder, self.kind, shard)
            try:
                self._opened[shard, name] = safe_open(path, "pt").get_slice(name)
            except (OSError, SafetensorError) as error:
                raise DataError(f"{path} is damaged: {error}") from None
        return self._opened[shard, name]


@dataclasses.dataclass(frozen=True)
class TextStates:
    """Text states by row; shape: (length, text_dim) of one."""

    shards: Shards
    shape: tuple[int, int]

    def states(self, rows: torch.Tensor) -> torch.Tensor:
        """float32 (B, length, text_dim) states of int64 rows (B,)."""
        return torch.stack([self.shards.row("states", row).float() for row in rows.tolist()])


@dataclasses.dataclass(frozen=True)
class LatentSet(Dataset):
    """Latents by index: float32 (2, C, h, w) mean and standard deviation, label, and rows of `texts` (K,)."""

    shards: Shards
    labels: torch.Tensor
    captions: torch.Tensor
    classes: tuple[str, ...]
    texts: TextStates | None
    levels: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        moments = torch.stack([self.shards.row(name, index).float() for name in ("mean", "std")])
        return moments, self.labels[index], self.captions[index]


def load_latents(folder: Path, size: int) -> tuple[LatentSet, LatentSet]:
    """Training and held-out latents of a complete cache, `size` pixels wide and high."""
    manifest = Manifest.load(folder)
    if not manifest.complete:
        raise DataError(f"{folder}: the cache is not complete; starflow encode with the same settings continues it")
    if manifest.shape[1:] != (size, size):
        raise DataError(f"{folder}: latents of {manifest.shape[1]}x{manifest.shape[2]} pixels, but data.size={size}")
    texts = None
    if manifest.text:
        texts = TextStates(Shards(folder, "text", manifest.counts["text"], manifest.shard_size), manifest.text)

    def split(kind: str) -> LatentSet:
        shards = Shards(folder, kind, manifest.counts[kind], manifest.shard_size)
        if not shards.count:
            return LatentSet(shards, torch.empty(0, dtype=torch.int64), torch.empty(0, 0), manifest.classes, texts)
        return LatentSet(shards, shards.column("labels"), shards.column("captions"), manifest.classes, texts)

    return tuple(split(kind) for kind in SPLITS)


def draw_latents(moments: torch.Tensor, noise_std: float, random: torch.Generator) -> torch.Tensor:
    """Draws (B, C, h, w) of the posterior with Gaussian noise on top, of moments (B, 2, C, h, w).

    The sum of both noises is one Gaussian, of variance std^2 + noise_std^2.
    """
    mean, std = moments.unbind(1)
    return mean + (std.square() + noise_std**2).sqrt() * torch.randn(mean.shape, generator=random)
