"""Safetensors of a model in the Hugging Face layout: one file, or shards with an index; written tensor by tensor."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import CheckpointError
from .files import write_text

MAX_SHARD = 5 * 10**9
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class Entry(NamedTuple):
    """A tensor that is written: `load` makes it at the moment at which its bytes are due."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_weights(folder: Path, entries: Iterable[Entry], max_shard: int = MAX_SHARD, stem: str = "model") -> list[str]:
    """Write STEM.safetensors, or STEM-00001-of-0000N.safetensors and STEM.safetensors.index.json; the files' names.

    A shard holds at most `max_shard` bytes of tensors, a larger tensor has a shard of its own. One tensor at a time is
    in memory. The folder is written in place: give a temporary one (`files.write_folder`). Raises OSError.
    """
    shards: list[list[Entry]] = []
    free = 0
    for entry in entries:
        if not shards or entry.nbytes > free:
            shards.append([])
            free = max_shard
        shards[-1].append(entry)
        free -= entry.nbytes
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    else:
        names = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard)
    if len(shards) == 1:
        return names
    index = {
        "metadata": {"total_size": sum(entry.nbytes for shard in shards for entry in shard)},
        "weight_map": {entry.name: name for name, shard in zip(names, shards) for entry in shard},
    }
    write_text(folder / f"{stem}.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    return [*names, f"{stem}.safetensors.index.json"]


def _write_file(path: Path, entries: list[Entry]) -> None:
    # Wide dtypes first, so that every tensor is aligned.
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        start, end = end, end + entry.nbytes
        header[entry.name] = {"dtype": DTYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            file.write(_bytes(entry))
        file.flush()
        os.fsync(file.fileno())


def _bytes(entry: Entry) -> memoryview:
    tensor = entry.load()
    if (tuple(tensor.shape), tensor.dtype) != (tuple(entry.shape), entry.dtype):
        raise ValueError(f"{entry.name}: {tensor.dtype} {tuple(tensor.shape)} is not what was announced")
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def read_weights(folder: Path, stem: str = "model") -> dict[str, torch.Tensor]:
    """Tensors of a folder, from one file or from the shards of its index; a single file comes first.

    Raises CheckpointError for a file that is missing or damaged, or an index that does not fit its shards.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if (folder / f"{stem}.safetensors").exists() or not index.exists():
        return _read_file(folder / f"{stem}.safetensors")
    shards, total = _read_index(index)
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks the shard {missing[0]} that {index.name} names")
    state: dict[str, torch.Tensor] = {}
    for name, weights in shards.items():
        shard = _read_file(folder / name)
        if shard.keys() != weights:
            differing = sorted(shard.keys() ^ weights)[0]
            raise CheckpointError(f"{folder / name} does not fit {index.name}: {differing} is in only one of them")
        state |= shard
    size = sum(tensor.nbytes for tensor in state.values())
    if total is not None and size != total:
        raise CheckpointError(f"{index}: total_size is {total}, its shards hold {size} bytes")
    return state


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _read_index(path: Path) -> tuple[dict[str, set[str]], int | None]:
    """Weights of each shard, and the bytes of all of them where the index says."""
    try:
        index = json.loads(path.read_text())
        weight_map, total = index["weight_map"], index.get("metadata", {}).get("total_size")
        shards: dict[str, set[str]] = {}
        for weight, name in weight_map.items():
            # A name with a folder in it could reach any file.
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{name!r} is not the name of a shard")
            shards.setdefault(name, set()).add(weight)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not an index of shards: {error}") from None
    return shards, total
