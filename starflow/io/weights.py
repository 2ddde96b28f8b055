"""Weight files of a model in the Hugging Face layout: one file, or several with an index; written tensor by tensor."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from ..errors import CheckpointError
from .files import write_text
from .tensors import load_tensors

# Bytes of tensors in a weight file.
MAX_BYTES = 5 * 10**9
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class Entry(NamedTuple):
    """Tensor to write. `load` returns it, and is called only when its bytes are written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_weights(folder: Path, entries: Iterable[Entry], max_bytes: int = MAX_BYTES, stem: str = "model") -> list[str]:
    """Write STEM.safetensors, or STEM-00001-of-0000N.safetensors and STEM.safetensors.index.json.

    One tensor at a time is in memory.

    Args:
        folder: folder to write in place; give a temporary one, see `write_folder`.
        entries: the tensors.
        max_bytes: bytes of tensors per weight file. A larger tensor has its own file.
        stem: first part of the names.

    Returns:
        Names of the files.

    Raises:
        OSError: the file system refuses.
    """
    parts: list[list[Entry]] = []
    free = 0
    for entry in entries:
        if not parts or entry.nbytes > free:
            parts.append([])
            free = max_bytes
        parts[-1].append(entry)
        free -= entry.nbytes
    if len(parts) == 1:
        names = [f"{stem}.safetensors"]
    else:
        names = [f"{stem}-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    for name, part in zip(names, parts, strict=True):
        _write_file(folder / name, part)
    if len(parts) == 1:
        return names
    index = {
        "metadata": {"total_size": sum(entry.nbytes for part in parts for entry in part)},
        "weight_map": {entry.name: name for name, part in zip(names, parts) for entry in part},
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


def read_weights(folder: Path, stem: str = "model", mmap: bool = False) -> dict[str, torch.Tensor]:
    """Read the tensors of a folder, from one file if it is there, else from the files of the index.

    Args:
        folder: the folder.
        stem: first part of the names.
        mmap: map the files, see `load_tensors`.

    Raises:
        CheckpointError: A file is missing or damaged, or the index does not fit the files.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if (folder / f"{stem}.safetensors").exists() or not index.exists():
        return _read_file(folder / f"{stem}.safetensors", mmap)
    names, total = _read_index(index)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks the weight file {missing[0]} that {index.name} names")
    state: dict[str, torch.Tensor] = {}
    for name, weights in names.items():
        part = _read_file(folder / name, mmap)
        if part.keys() != weights:
            differing = sorted(part.keys() ^ weights)[0]
            raise CheckpointError(f"{folder / name} does not fit {index.name}: {differing} is in only one of them")
        state |= part
    size = sum(tensor.nbytes for tensor in state.values())
    if total is not None and size != total:
        raise CheckpointError(f"{index}: total_size is {total}, its files hold {size} bytes")
    return state


def _read_file(path: Path, mmap: bool) -> dict[str, torch.Tensor]:
    try:
        return load_tensors(path, mmap)
    except OSError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _read_index(path: Path) -> tuple[dict[str, set[str]], int | None]:
    """Names of the weights in each file, and the bytes of all of them if the index says so."""
    try:
        index = json.loads(path.read_bytes())
        weight_map, total = index["weight_map"], index.get("metadata", {}).get("total_size")
        names: dict[str, set[str]] = {}
        for weight, name in weight_map.items():
            # A name with a folder in it could reach any file.
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{name!r} is not the name of a weight file")
            names.setdefault(name, set()).add(weight)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not an index of weight files: {error}") from None
    return names, total
