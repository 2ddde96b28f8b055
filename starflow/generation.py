"""Many images of a pipeline into a folder: a run that was killed goes on where it stopped."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from .certificate import Certificate, combine
from .data import generator
from .errors import ConfigError, InverseError, StarflowError
from .files import write_atomically, write_text
from .sampling import save_grid
from .solvers import TOLERANCE, BlockReport, add_reports, method_of

if TYPE_CHECKING:
    from .pipelines import FlowPipeline

MANIFEST = "manifest.jsonl"
GRID = "grid.png"
GRID_IMAGES = 100
# Settings that change an image by no more than the tolerance.
FREE = ("method", "window")


@dataclasses.dataclass(frozen=True)
class Job:
    """One image: the copy-th of a condition, which is a prompt or a class or nothing, and the condition's number.

    Its noise follows from the seed of the run and these two numbers.
    """

    index: int
    copy: int
    condition: str | int | None

    @property
    def file(self) -> str:
        """Name of the image."""
        return f"{self.index:06d}-{self.copy:04d}.png"


@dataclasses.dataclass(frozen=True)
class GenerationReport:
    """count images written in `seconds` and kept ones that were there; stages: seconds of each stage of the pipeline;
    the rest as in PipelineReport, over all batches: the most passes, the largest certificate, its mean."""

    count: int
    kept: int
    seconds: float
    images_per_second: float
    stages: dict[str, float]
    method: str
    steps: int
    certificate: float | None
    certificate_mean: float | None
    blocks: list[BlockReport]


def generate(
    pipe: FlowPipeline,
    jobs: list[Job],
    out: Path,
    seed: int,
    batch_size: int,
    options: dict[str, Any],
    settings: dict[str, Any],
    certify: bool = False,
    columns: int = 10,
) -> GenerationReport:
    """Write the images of the jobs and a manifest, but for those that are there; a grid of them where they are few.

    options: arguments of the pipeline's call. settings: what else decides the images, the checkpoint say. Where images
    are there, these, the seed and the images' conditions must be those that the folder was begun with, ConfigError
    otherwise; but for how the flow is inverted, to the same tolerance. StarflowError where a file cannot be written.
    """
    settings = {**settings, "seed": seed, **options}
    kept = _begin(out, jobs, json.loads(json.dumps(settings)))
    todo = [job for job in jobs if job.file not in kept]
    stages: dict[str, float] = {}
    blocks, errors, start = [], [], time.perf_counter()
    for first in range(0, len(todo), batch_size):
        batch = todo[first : first + batch_size]
        pipe.set_progress_bar_config(
            desc=f"{first + len(batch)} of {len(todo)} images", leave=False, disable=not sys.stderr.isatty()
        )
        try:
            output = _draw(pipe, batch, seed, {**options, "certify": certify})
        except InverseError as error:
            raise InverseError(f"{batch[0].file} to {batch[-1].file}: {error}") from None
        for job, image in zip(batch, output.images):
            write_atomically(out / job.file, lambda path, image=image: image.save(path, format="PNG"))
        _record(out, batch)
        stages = {name: stages.get(name, 0.0) + seconds for name, seconds in output.report.seconds.items()}
        blocks = add_reports(blocks, output.report.blocks)
        if output.report.certificate is not None:
            errors.append((Certificate(output.report.certificate, output.report.certificate_mean), len(batch)))
    seconds = time.perf_counter() - start
    if len(jobs) <= GRID_IMAGES:
        save_grid(_read(out, jobs), out / GRID, columns)
    return GenerationReport(
        len(todo),
        len(jobs) - len(todo),
        seconds,
        len(todo) / seconds if todo else 0.0,
        stages,
        method_of(blocks),
        sum(block.passes for block in blocks),
        *combine(errors),
        blocks,
    )


def _draw(pipe: FlowPipeline, batch: list[Job], seed: int, options: dict[str, Any]):
    conditions = [job.condition for job in batch]
    if isinstance(conditions[0], str):
        given = {"prompt": conditions}
    elif pipe.transformer.config.num_classes:
        given = {"class_labels": [-1 if number is None else number for number in conditions]}
    else:
        given = {"num_images_per_prompt": len(batch)}
    return pipe(**given, **options, generator=[generator(seed, job.index, job.copy) for job in batch])


def _begin(out: Path, jobs: list[Job], settings: dict[str, Any]) -> set[str]:
    """Names of the images that are there; the manifest then lists them and no others."""
    begun, lines = _manifest(out) if any(out.glob("[0-9]*.png")) else (settings, {})
    old, new = ({"tol": TOLERANCE, **{k: v for k, v in each.items() if k not in FREE}} for each in (begun, settings))
    if names := sorted(name for name in old.keys() | new if old.get(name) != new.get(name)):
        raise ConfigError(f"{out} was begun with another {', '.join(names)}: give the same or choose another folder")
    for job in jobs:
        if lines.setdefault(job.file, job.condition) != job.condition:
            raise ConfigError(f"{out / job.file} was drawn for {lines[job.file]!r}, not {job.condition!r}")
    there = {name: condition for name, condition in lines.items() if (out / name).exists()}
    # Temporary files of a run that was killed.
    for path in out.glob(".*.part"):
        path.unlink(missing_ok=True)
    write_text(out / MANIFEST, _line({"settings": settings}) + "".join(_line(_entry(*item)) for item in there.items()))
    return set(there)


def _manifest(out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings, and conditions by file name. A last line may be cut short."""
    try:
        entries = [json.loads(line) for line in (out / MANIFEST).read_text().split("\n")[:-1]]
        return entries[0]["settings"], {entry["file"]: entry["condition"] for entry in entries[1:]}
    except FileNotFoundError:
        raise ConfigError(f"{out} holds images but no {MANIFEST}: choose another folder") from None
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        reason = getattr(error, "strerror", None) or "not the manifest of a run"
        raise ConfigError(f"{out / MANIFEST}: {reason}") from None


def _record(out: Path, batch: list[Job]) -> None:
    try:
        with open(out / MANIFEST, "a") as file:
            file.write("".join(_line(_entry(job.file, job.condition)) for job in batch))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StarflowError(f"cannot write {out / MANIFEST}: {error.strerror}") from None


def _entry(file: str, condition: str | int | None) -> dict[str, Any]:
    return {"file": file, "condition": condition}


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"


def _read(out: Path, jobs: list[Job]) -> torch.Tensor:
    arrays = [np.atleast_3d(np.asarray(Image.open(out / job.file))) for job in jobs]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
