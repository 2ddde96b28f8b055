"""Sample files: one image as PNG, or many samples as npz or safetensors."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..io.digests import digest
from ..io.files import write_atomically
from ..io.images import save_image
from ..io.tensors import load_tensors, save_tensors
from .jobs import SampleFile


def write_samples(out: Path, file: SampleFile, values: torch.Tensor) -> str | None:
    """Write a sample file.

    Args:
        out: folder of the run.
        file: the file and its samples.
        values: (N, C, H, W) uint8 pixels or float32 latents.

    Returns:
        The digest of the file, None for a PNG.
    """
    path = out / file.name
    if file.is_image:
        save_image(values[0], path)
        return None
    labels = [-1 if job.condition is None else job.index for job in file.jobs]
    columns = {"labels": labels, "copies": [job.copy for job in file.jobs]}
    numbers = {name: torch.tensor(column, dtype=torch.int64, device="cpu") for name, column in columns.items()}
    if path.suffix == ".npz":
        write_atomically(path, functools.partial(_write_npz, values, numbers))
    else:
        save_tensors(
            {"pixels" if values.dtype == torch.uint8 else "latents": values, **numbers}, path, {"format": "pt"}
        )
    return digest(path)


def read_pixels(path: Path) -> torch.Tensor:
    """Read the uint8 images (N, C, H, W) of a sample file."""
    if path.suffix == ".safetensors":
        return load_tensors(path)["pixels"]
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            images = arrays["arr_0"]
    else:
        images = np.atleast_3d(np.asarray(Image.open(path)))[None]
    return torch.from_numpy(images.copy()).permute(0, 3, 1, 2)


def _write_npz(values: torch.Tensor, numbers: dict[str, torch.Tensor], path: Path) -> None:
    # Given a path, numpy would add a suffix to it.
    with open(path, "wb") as file:
        np.savez(
            file,
            values.permute(0, 2, 3, 1).contiguous().numpy(),
            **{name: tensor.numpy() for name, tensor in numbers.items()},
        )
