"""Safetensors files: atomic writing, reading, and reading of single rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from .files import write_atomically


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically.

    Args:
        tensors: tensors by name, on any device.
        path: file to write.
        metadata: text to store in the header.

    Raises:
        StarflowError: the file system refuses.
    """

    def write(temporary: Path) -> None:
        try:
            stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(stored, temporary, metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from None

    write_atomically(path, write)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file by name.

    Args:
        path: file to read.

    Raises:
        OSError: the file is missing or damaged.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise OSError(str(error)) from None


def open_tensor(path: Path, name: str) -> Any:
    """Return a tensor of a safetensors file as a slice of safetensors, which reads rows when it is indexed.

    Args:
        path: file to open.
        name: name of the tensor.

    Raises:
        OSError: the file is missing or damaged, or has no such tensor.
    """
    try:
        return safe_open(path, "pt").get_slice(name)
    except SafetensorError as error:
        raise OSError(str(error)) from None
