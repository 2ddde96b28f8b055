"""What a run of many samples has written so far: its files, and a line for each in a manifest beside them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import ConfigError, StarflowError
from ..inversion.solvers import TOLERANCE
from ..io.files import write_text

MANIFEST = "manifest.jsonl"
# What processes other than the first have drawn since the run was begun, each its own.
PART = "manifest.{}.jsonl"
# Settings that change an image by no more than the tolerance.
FREE = ("method", "window")
FORMATS = ("png", "npz", "safetensors")
SHARD_SIZE = 1000


@dataclasses.dataclass(frozen=True)
class Job:
    """One sample: the copy-th of a condition, which is a prompt or a class or nothing, and the condition's number.

    Its noise follows from the seed of the run and these two numbers.
    """

    index: int
    copy: int
    condition: str | int | None

    @property
    def file(self) -> str:
        """Name of the sample as an image of its own."""
        return f"{self.index:06d}-{self.copy:04d}.png"


@dataclasses.dataclass(frozen=True)
class Layout:
    """How samples are written.

    format: "png", a file an image; "npz", shards of arr_0, uint8 (N, H, W, C), labels and copies; "safetensors", shards
    of pixels, uint8 (N, C, H, W), or with `latents` what the flow made, float32 (N, C, h, w), labels and copies. A
    label is the class, -1 for none, or the prompt's number. shard_size: samples of a shard, the last may have fewer.

    Raises ConfigError for another format, or latents elsewhere than in safetensors.
    """

    format: str = "png"
    shard_size: int = SHARD_SIZE
    latents: bool = False

    def __post_init__(self):
        if self.format not in FORMATS:
            raise ConfigError(f"format={self.format!r}: expected one of {', '.join(FORMATS)}")
        if not isinstance(self.shard_size, int) or self.shard_size < 1:
            raise ConfigError(f"shard_size={self.shard_size}: expected an integer of at least 1")
        if self.latents and self.format != "safetensors":
            raise ConfigError(f"latents are written as safetensors, not as {self.format}")

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the files, for the manifest."""
        return {} if self.format == "png" else dataclasses.asdict(self)

    def held_bytes(self, values: int) -> int:
        """Of samples that wait for their file, and a copy of them as it is written; values: of a sample."""
        return 0 if self.format == "png" else 2 * self.shard_size * values * (4 if self.latents else 1)

    def shards(self, jobs: list[Job]) -> list[Shard]:
        """The files of a run."""
        if self.format == "png":
            return [Shard(job.file, (job,)) for job in jobs]
        parts = [tuple(jobs[first : first + self.shard_size]) for first in range(0, len(jobs), self.shard_size)]
        return [Shard(f"{i:06d}.{self.format}", part) for i, part in enumerate(parts)]


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file and its samples, in order: an image, or many samples."""

    file: str
    jobs: tuple[Job, ...]

    @property
    def is_image(self) -> bool:
        """Whether it holds one image as a PNG."""
        return self.file.endswith(".png")

    def entry(self, digest: str | None = None) -> dict[str, Any]:
        """Its line of the manifest; digest: of the file, of a shard."""
        if self.is_image:
            return {"file": self.file, "condition": self.jobs[0].condition}
        samples = [[job.index, job.copy, job.condition] for job in self.jobs]
        return {"file": self.file, "sha256": digest, "samples": samples}

    def is_in(self, out: Path, entry: dict[str, Any], check: bool) -> bool:
        """Whether the file of a line is there and has these samples, ConfigError where they are others. check: whether
        a shard has the bytes that were written."""
        path = out / self.file
        if self.is_image:
            if entry["condition"] != (wanted := self.jobs[0].condition):
                raise ConfigError(f"{path} was drawn for {entry['condition']!r}, not {wanted!r}")
            return path.exists()
        wanted = self.entry()["samples"]
        for old, new in zip(entry["samples"], wanted):
            if old != new:
                names = (f"number {copy} of condition {index}, {what!r}" for index, copy, what in (old, new))
                raise ConfigError("{} holds {}, where {} is due: choose another folder".format(path, *names))
        if len(entry["samples"]) < len(wanted) or not path.exists():
            return False
        if check and file_digest(path) != entry["sha256"]:
            warnings.warn(f"{path} is damaged: it is drawn again", stacklevel=2)
            return False
        return True


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def begin(out: Path, shards: list[Shard], settings: dict[str, Any], check: bool = True) -> set[str]:
    """Names of the files that are there; the manifest then lists them and no others.

    check: whether shards have the bytes that were written; those that have not are not there. Raises ConfigError where
    the folder was begun with other settings or samples.
    """
    present = {path.name for path in out.glob("[0-9]*.*")}
    begun, entries = _read(out) if present else (settings, {})
    known = {"tol": TOLERANCE, "quantize": "none"}
    old, new = ({**known, **{k: v for k, v in each.items() if k not in FREE}} for each in (begun, settings))
    if names := sorted(name for name in old.keys() | new if old.get(name) != new.get(name)):
        raise ConfigError(f"{out} was begun with another {', '.join(names)}: give the same or choose another folder")
    for shard in shards:
        if (entry := entries.get(shard.file)) is not None:
            if not shard.is_in(out, entry, check):
                del entries[shard.file]
        elif shard.is_image and shard.file in present:
            # A run that was killed may have left an image without its line, which is right for its settings.
            entries[shard.file] = shard.entry()
    # What is there beside the samples asked for stays listed.
    there = {name: entry for name, entry in entries.items() if name in present}
    # Temporary files of a run that was killed.
    for path in out.glob(".*.part"):
        path.unlink(missing_ok=True)
    write_text(out / MANIFEST, _line({"settings": settings}) + "".join(_line(entry) for entry in there.values()))
    # Only now that the manifest has their lines.
    for path in out.glob(PART.format("*")):
        path.unlink(missing_ok=True)
    return set(there)


def record(out: Path, rank: int, entries: Iterable[dict[str, Any]]) -> None:
    """Add lines of files that are on disk."""
    path = out / (PART.format(rank) if rank else MANIFEST)
    try:
        with open(path, "a") as file:
            file.write("".join(map(_line, entries)))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StarflowError(f"cannot write {path}: {error.strerror}") from None


def _read(out: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Settings, and lines by file name, of all processes. The last line of each may be cut short."""
    path = out / MANIFEST
    try:
        first, *found = _lines(path)
        settings = first["settings"].copy()
        for path in sorted(out.glob(PART.format("*"))):
            found += _lines(path)
        for entry in found:
            # A line lacks none of its parts.
            entry["condition"] if entry["file"].endswith(".png") else (entry["sha256"], entry["samples"])
        return settings, {entry["file"]: entry for entry in found}
    except FileNotFoundError:
        raise ConfigError(f"{out} holds images but no {MANIFEST}: choose another folder") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or "not the manifest of a run"
        raise ConfigError(f"{path}: {reason}") from None


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"
