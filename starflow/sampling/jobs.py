"""Samples of a run, and the files that hold them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ..errors import ConfigError
from ..seeds import generator
from ..settings import check_types

FORMATS = ("png", "npz", "safetensors")
SAMPLES_PER_FILE = 1000


@dataclasses.dataclass(frozen=True)
class Job:
    """One sample. Its noise is determined by the seed of the run, `index` and `copy`.

    Args:
        index: index of the condition: of the prompt, or the class, or 0 for none.
        copy: index of the sample among the samples of its condition.
        condition: the prompt or class, None for none.
    """

    index: int
    copy: int
    condition: str | int | None

    @property
    def image_file(self) -> str:
        """Name of the sample's own image file."""
        return f"{self.index:06d}-{self.copy:04d}.png"

    def generator(self, seed: int) -> torch.Generator:
        """Return the generator of the sample's noise in a run with a seed."""
        return generator(seed, self.index, self.copy)


@dataclasses.dataclass(frozen=True)
class SampleFile:
    """A file of a run and its samples in order: one image, or many samples."""

    name: str
    jobs: tuple[Job, ...]

    @property
    def is_image(self) -> bool:
        """Whether the file is a PNG of one image."""
        return self.name.endswith(".png")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How samples are written.

    Args:
        format: "png" writes one file per image. "npz" writes files with arr_0, uint8 (N, H, W, C), labels and copies.
            "safetensors" writes files with pixels, uint8 (N, C, H, W), labels and copies. A label is the class, -1 for
            none, or the index of the prompt.
        per_file: samples per file of "npz" and "safetensors"; the last file may hold fewer.
        latents: write the output of the flow, float32 (N, C, h, w), as latents in place of pixels.

    Raises:
        ConfigError: the format is unknown, or latents are requested in another format than safetensors.
    """

    format: str = "png"
    per_file: int = SAMPLES_PER_FILE
    latents: bool = False

    def __post_init__(self):
        check_types(self)
        if self.format not in FORMATS:
            raise ConfigError(f"format={self.format!r}: expected one of {', '.join(FORMATS)}")
        if self.per_file < 1:
            raise ConfigError(f"per_file={self.per_file}: expected an integer of at least 1")
        if self.latents and self.format != "safetensors":
            raise ConfigError(f"latents are written as safetensors, not as {self.format}")

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that determine the files, for the ledger."""
        return {} if self.format == "png" else dataclasses.asdict(self)

    def held_bytes(self, values: int) -> int:
        """Bytes of samples of `values` values that wait for their file, and of a copy while it is written."""
        return 0 if self.format == "png" else 2 * self.per_file * values * (4 if self.latents else 1)

    def files(self, jobs: list[Job]) -> list[SampleFile]:
        """Return the files of a run."""
        if self.format == "png":
            return [SampleFile(job.image_file, (job,)) for job in jobs]
        parts = [tuple(jobs[first : first + self.per_file]) for first in range(0, len(jobs), self.per_file)]
        return [SampleFile(f"{i:06d}.{self.format}", part) for i, part in enumerate(parts)]
