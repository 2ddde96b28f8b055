"""Caches of latents with the text states of their captions, written by `starflow encode`.

A cache is a folder of cache files (safetensors) with a cache index. A cache file of images holds:

- `mean`, `std`: (n, C, h, w) moments of the autoencoder's posterior, times its scaling factor.
- `labels`: (n,) classes.
- `captions`: (n, K) rows of the text states.

A cache file of text holds `tokens`, (m, length), and `states`, (m, length, text_dim), unless they are left out. Row 0
of all text belongs to the empty prompt.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from ..errors import DataError
from ..io.files import located
from ..io.tensors import open_tensor
from ..seeds import normal

INDEX = "index.json"
FORMAT = 2
SPLITS = ("train", "held_out")
EMPTY_PROMPT = 0


@dataclasses.dataclass(frozen=True)
class CacheIndex:
    """Content of a cache, and the settings with which it was made.

    Args:
        settings: settings of the data, digests of the models, and rows per cache file.
        counts: rows by kind of cache file: "train", "held_out" and "text".
        shape: (C, h, w) of a latent.
        scaling_factor: scaling factor of the autoencoder, which the latents include.
        classes: names of the classes.
        captions: captions per image, 0 for none.
        text: (length, text_dim) of the text states, None without a text encoder.
        complete: whether all cache files are written.
        format: version of the format.
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
    def load(cls, folder: Path) -> CacheIndex:
        """Read the index of a cache.

        Args:
            folder: folder of the cache.

        Raises:
            DataError: the folder has no index, or one of another format.
        """
        path = Path(folder) / INDEX
        try:
            fields = json.loads(path.read_bytes())
            if fields.get("format") != FORMAT:
                raise DataError(f"{path}: format {fields.get('format')}, this version reads {FORMAT}")
            for name in ("shape", "classes", "text"):
                fields[name] = None if fields[name] is None else tuple(fields[name])
            return cls(**fields)
        except FileNotFoundError:
            where = located(Path(folder))
            raise DataError(f"no cached latents at {where}: {INDEX} is missing; starflow encode writes it") from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not an index of cached latents ({error})") from None

    def dumps(self) -> str:
        """Return the JSON that `load` reads."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @property
    def rows_per_file(self) -> int:
        """Return the number of rows per cache file; the last file of a kind may have fewer."""
        return self.settings["rows_per_file"]


def cache_path(folder: Path, kind: str, number: int) -> Path:
    """Return the path of a cache file.

    Args:
        folder: folder of the cache.
        kind: "train", "held_out" or "text".
        number: number of the file among those of its kind.
    """
    return Path(folder) / f"{kind}-{number:05d}.safetensors"


class CacheFiles:
    """Rows of the tensors in the cache files of one kind, read on demand.

    The files are mapped, because all of them may be larger than the memory. They must stay as they are while they are
    in use, as `starflow encode` leaves them.

    Args:
        folder: folder of the cache.
        kind: "train", "held_out" or "text".
        count: number of rows.
        rows_per_file: rows of a cache file.

    Raises:
        DataError: a cache file is missing.
    """

    def __init__(self, folder: Path, kind: str, count: int, rows_per_file: int):
        self.folder, self.kind, self.count, self.rows_per_file = Path(folder), kind, count, rows_per_file
        self._opened: dict[tuple[int, str], Callable[[int | slice], torch.Tensor]] = {}
        for number in range(-(-count // rows_per_file)):
            if not (path := cache_path(folder, kind, number)).exists():
                raise DataError(f"{path} is missing: starflow encode writes it again")

    def __getstate__(self) -> dict[str, Any]:
        # An open file cannot be sent to another process.
        return {**self.__dict__, "_opened": {}}

    def row(self, name: str, index: int) -> torch.Tensor:
        """Return one row of a tensor.

        Args:
            name: name of the tensor.
            index: index of the row.

        Raises:
            DataError: the cache file is damaged.
        """
        number, row = divmod(index, self.rows_per_file)
        return self._slice(number, name)(row)

    def column(self, name: str) -> torch.Tensor:
        """Return all rows of a small tensor.

        Args:
            name: name of the tensor.

        Raises:
            DataError: a cache file is damaged.
        """
        files = range(-(-self.count // self.rows_per_file))
        return torch.cat([self._slice(number, name)(slice(None)) for number in files])

    def _slice(self, number: int, name: str) -> Callable[[int | slice], torch.Tensor]:
        if (number, name) not in self._opened:
            path = cache_path(self.folder, self.kind, number)
            try:
                self._opened[number, name] = open_tensor(path, name)
            except OSError as error:
                raise DataError(f"{path} is damaged: {error}") from None
        return self._opened[number, name]


@dataclasses.dataclass(frozen=True)
class TextStates:
    """Text states and tokens by row.

    Args:
        files: cache files of text.
        shape: (length, text_dim) of the states of one caption.
        has_states: whether the cache holds states; if not, it holds tokens alone.
        tokenizer: digest of the tokenizer.
    """

    files: CacheFiles
    shape: tuple[int, int]
    has_states: bool
    tokenizer: str

    def states(self, rows: torch.Tensor) -> torch.Tensor:
        """Return float32 (B, length, text_dim) states.

        Args:
            rows: int64 (B,) rows.
        """
        return torch.stack([self.files.row("states", row).float() for row in rows.tolist()])

    def tokens(self, rows: torch.Tensor) -> torch.Tensor:
        """Return int64 (B, length) tokens.

        Args:
            rows: int64 (B,) rows.
        """
        return torch.stack([self.files.row("tokens", row) for row in rows.tolist()])


@dataclasses.dataclass(frozen=True)
class LatentSet(Dataset):
    """Data set of latents. An item is float32 (2, C, h, w) mean and standard deviation, a label, (K,) caption rows.

    Args:
        files: cache files of images.
        labels: int64 (N,) classes.
        captions: int64 (N, K) rows of `texts`.
        classes: names of the classes.
        texts: text states of the captions, None without a text encoder.
        levels: gray levels, 0 because latents have none.
    """

    files: CacheFiles
    labels: torch.Tensor
    captions: torch.Tensor
    classes: tuple[str, ...]
    texts: TextStates | None
    levels: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        moments = torch.stack([self.files.row(name, index).float() for name in ("mean", "std")])
        return moments, self.labels[index], self.captions[index]


def load_latents(folder: Path, size: int) -> tuple[LatentSet, LatentSet]:
    """Return the training and held-out latents of a complete cache.

    Args:
        folder: folder of the cache.
        size: width and height of the latents.

    Raises:
        DataError: the cache is missing, incomplete, damaged or of another size.
    """
    index = CacheIndex.load(folder)
    if not index.complete:
        raise DataError(f"{folder}: the cache is not complete; starflow encode with the same settings continues it")
    if index.shape[1:] != (size, size):
        raise DataError(f"{folder}: latents of {index.shape[1]}x{index.shape[2]} pixels, but data.size={size}")
    texts = None
    if index.text:
        texts = TextStates(
            CacheFiles(folder, "text", index.counts["text"], index.rows_per_file), index.text,
            index.settings["text_dtype"] != "none", index.settings["tokenizer"],
        )  # fmt: skip

    def split(kind: str) -> LatentSet:
        files = CacheFiles(folder, kind, index.counts[kind], index.rows_per_file)
        if not files.count:
            labels, captions = (torch.empty(shape, dtype=torch.int64, device="cpu") for shape in ((0,), (0, 0)))
            return LatentSet(files, labels, captions, index.classes, texts)
        return LatentSet(files, files.column("labels"), files.column("captions"), index.classes, texts)

    return tuple(split(kind) for kind in SPLITS)


def draw_latents(moments: torch.Tensor, noise_std: float, random: torch.Generator) -> torch.Tensor:
    """Return (B, C, h, w) draws from the posterior, plus Gaussian noise.

    The sum of both noises is drawn as one Gaussian of variance std^2 + noise_std^2.

    Args:
        moments: (B, 2, C, h, w) means and standard deviations.
        noise_std: standard deviation of the added noise.
        random: source of the noise.
    """
    mean, std = moments.unbind(1)
    return mean + (std.square() + noise_std**2).sqrt() * normal(mean.shape, random)
