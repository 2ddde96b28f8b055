"""Sample files: one image as PNG, or many samples as npz or safetensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ..io.digests import digest
from ..io.files import write_atomically
from ..io.images import save_image
from .jobs import Job, SampleFile


def write_samples(out: Path, file: SampleFile, values: torch.Tensor) -> str | None:
    """Write a sample file.

    Args:
        out: Folder of the run.
        file: The file and its samples.
        values: (N, C, H, W) uint8 pixels or float32 latents.

    Returns:
        The digest of the file, None for a PNG.
    """
    path, digests = out / file.name, []
    if file.is_image:
        save_image(values[0], path)
        return None

    def write(temporary: Path) -> None:
        (_write_npz if path.suffix == ".npz" else _write_safetensors)(temporary, file.jobs, values)
        digests.append(digest(temporary))

    write_atomically(path, write)
    return digests[0]


def read_pixels(path: Path) -> torch.Tensor:
    """Read the uint8 images (N, C, H, W) of a sample file."""
    if path.suffix == ".safetensors":
        return load_file(path)["pixels"]
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            images = arrays["arr_0"]
    else:
        images = np.atleast_3d(np.asarray(Image.open(path)))[None]
    return torch.from_numpy(images.copy()).permute(0, 3, 1, 2)


def _write_npz(path: Path, jobs: tuple[Job, ...], values: torch.Tensor) -> None:
    images = values.permute(0, 2, 3, 1).contiguous().numpy()
    # numpy would add a suffix to the name of the file.
    with open(path, "wb") as file:
        np.savez(file, images, **{name: numbers.numpy() for name, numbers in _numbers(jobs).items()})


def _write_safetensors(path: Path, jobs: tuple[Job, ...], values: torch.Tensor) -> None:
    name = "pixels" if values.dtype == torch.uint8 else "latents"
    save_file({name: values.contiguous(), **_numbers(jobs)}, path, {"format": "pt"})


def _numbers(jobs: tuple[Job, ...]) -> dict[str, torch.Tensor]:
    labels = [-1 if job.condition is None else job.index for job in jobs]
    return {"labels": torch.tensor(labels), "copies": torch.tensor([job.copy for job in jobs])}
