"""Files of samples: images as PNG, and shards of many samples as npz or safetensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..io.files import write_atomically
from .ledger import Job, Shard, file_digest
from .sample import save_image


def write_shard(out: Path, shard: Shard, values: torch.Tensor) -> str | None:
    """Write the samples of a shard, (N, C, H, W), uint8 or latents; the file's digest, None of a PNG."""
    path, digests = out / shard.file, []
    if shard.is_image:
        save_image(values[0], path)
        return None

    def write(temporary: Path) -> None:
        (_write_npz if path.suffix == ".npz" else _write_safetensors)(temporary, shard.jobs, values)
        digests.append(file_digest(temporary))

    write_atomically(path, write)
    return digests[0]


def read_pixels(path: Path) -> torch.Tensor:
    """uint8 images (N, C, H, W) of a file that `write_shard` wrote."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)["pixels"]
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            images = arrays["arr_0"]
    else:
        images = np.atleast_3d(np.asarray(Image.open(path)))[None]
    return torch.from_numpy(images.copy()).permute(0, 3, 1, 2)


def _write_npz(path: Path, jobs: tuple[Job, ...], values: torch.Tensor) -> None:
    images = values.permute(0, 2, 3, 1).contiguous().numpy()
    # Given a name, numpy would add a suffix to it.
    with open(path, "wb") as file:
        np.savez(file, images, **{name: numbers.numpy() for name, numbers in _numbers(jobs).items()})


def _write_safetensors(path: Path, jobs: tuple[Job, ...], values: torch.Tensor) -> None:
    from safetensors.torch import save_file

    name = "pixels" if values.dtype == torch.uint8 else "latents"
    save_file({name: values.contiguous(), **_numbers(jobs)}, path, {"format": "pt"})


def _numbers(jobs: tuple[Job, ...]) -> dict[str, torch.Tensor]:
    labels = [-1 if job.condition is None else job.index for job in jobs]
    return {"labels": torch.tensor(labels), "copies": torch.tensor([job.copy for job in jobs])}
