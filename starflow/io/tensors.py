"""Safetensors files: atomic writing, reading, and reading of single rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

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
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(stored, temporary, metadata)

    write_atomically(path, write)


def load_tensors(path: Path, mmap: bool = False) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file by name.

    Args:
        path: file to read.
        mmap: map the file instead of copying it. It must then stay as it is while the tensors are in use: other bytes
            change them, and a shorter file ends the process.

    Raises:
        OSError: the file is missing or damaged.
    """
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise OSError(str(error)) from None
    return tensors if mmap else {name: tensor.clone() for name, tensor in tensors.items()}


def copy_weights(model: nn.Module) -> None:
    """Copy the weights of a model on the CPU, so that files from which they were mapped may change later."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def open_tensor(path: Path, name: str) -> Callable[[int | slice], torch.Tensor]:
    """Return a function that reads rows of a tensor of a safetensors file.

    The file is mapped, because it may be larger than the memory. It must stay as it is while the slice is in use.

    Args:
        path: file to open.
        name: name of the tensor.

    Raises:
        OSError: the file is missing or damaged, or has no such tensor.
    """
    try:
        opened = safe_open(path, "pt").get_slice(name)
    except SafetensorError as error:
        raise OSError(str(error)) from None

    def read(rows: int | slice) -> torch.Tensor:
        with torch.device("cpu"):  # a slice of safetensors is made on the default device
            return opened[rows]

    return read
