"""Many images of a pipeline into a folder, by one or more processes: a run that was killed goes on where it stopped."""

from __future__ import annotations

import dataclasses
import functools
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
from .processes import Processes
from .sampling import save_grid
from .solvers import TOLERANCE, BlockReport, add_reports, method_of

if TYPE_CHECKING:
    from .pipelines import FlowPipeline

MANIFEST = "manifest.jsonl"
# What processes other than the first have drawn since the run was begun, each its own.
PART = "manifest.{}.jsonl"
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
    """count images written in `seconds` and kept ones that were there; stages: seconds of each stage of the pipeline,
    these two of the slowest process; the rest as in PipelineReport, over all batches: the most passes, the largest
    certificate, its mean."""

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

    Under torchrun every process calls this and draws its share of what is left, in batches of batch_size but the last;
    the report is that of all.
    """
    processes = Processes()
    settings = json.loads(json.dumps({**settings, "seed": seed, **options}))
    kept = processes.first(lambda: _begin(out, jobs, settings))
    todo = [job for job in jobs if job.file not in kept][processes.rank :: processes.count]
    try:
        drawn = _draw_all(pipe, todo, out, seed, batch_size, {**options, "certify": certify}, processes.rank)
    except StarflowError as error:
        where = f"process {processes.rank} of {processes.count}: " if processes.count > 1 else ""
        raise type(error)(f"{where}{error}") from None
    parts = processes.gather(drawn)
    if processes.count > 1:
        processes.first(lambda: _begin(out, jobs, settings))
    if len(jobs) <= GRID_IMAGES and processes.rank == 0:
        save_grid(_read(out, jobs), out / GRID, columns)
    return _report(parts, len(jobs) - len(kept & {job.file for job in jobs}), len(jobs))


def _draw_all(
    pipe: FlowPipeline, todo: list[Job], out: Path, seed: int, batch_size: int, options: dict[str, Any], rank: int
) -> tuple[float, dict[str, float], list[BlockReport], list[tuple[Certificate, int]]]:
    """Draw and write what is to do; seconds, those of the stages, reports of the blocks, certificates."""
    stages: dict[str, float] = {}
    blocks, errors, start = [], [], time.perf_counter()
    for first in range(0, len(todo), batch_size):
        batch = todo[first : first + batch_size]
        pipe.set_progress_bar_config(
            desc=f"{first + len(batch)} of {len(todo)} images", leave=False, disable=rank > 0 or not sys.stderr.isatty()
        )
        try:
            output = _draw(pipe, batch, seed, options)
        except InverseError as error:
            raise InverseError(f"{batch[0].file} to {batch[-1].file}: {error}") from None
        for job, image in zip(batch, output.images):
            write_atomically(out / job.file, lambda path, image=image: image.save(path, format="PNG"))
        _record(out / (PART.format(rank) if rank else MANIFEST), batch)
        stages = {name: stages.get(name, 0.0) + seconds for name, seconds in output.report.seconds.items()}
        blocks = add_reports(blocks, output.report.blocks)
        if output.report.certificate is not None:
            errors.append((Certificate(output.report.certificate, output.report.certificate_mean), len(batch)))
    return time.perf_counter() - start, stages, blocks, errors


def _report(parts: list[tuple], count: int, total: int) -> GenerationReport:
    """Of all processes together."""
    seconds = max(part[0] for part in parts)
    stages = {name: max(part[1].get(name, 0.0) for part in parts) for part in parts for name in part[1]}
    blocks = functools.reduce(add_reports, (part[2] for part in parts if part[2]), [])
    errors = [error for part in parts for error in part[3]]
    return GenerationReport(
        count,
        total - count,
        seconds,
        count / seconds if count else 0.0,
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
    # Backward passes of denoising have bits that depend on their batch.
    return pipe(
        **given, **options, denoise_batch_size=1, generator=[generator(seed, job.index, job.copy) for job in batch]
    )


def _begin(out: Path, jobs: list[Job], settings: dict[str, Any]) -> set[str]:
    """Names of the images that are there; the manifest then lists them and no others."""
    begun, lines = _manifest(out) if any(out.glob("[0-9]*.png")) else (settings, {})
    known = {"tol": TOLERANCE, "quantize": "none"}
    old, new = ({**known, **{k: v for k, v in each.items() if k not in FREE}} for each in (begun, settings))
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
    # Only now that the manifest has their lines.
    for path in out.glob(PART.format("*")):
        path.unlink(missing_ok=True)
    return set(there)


def _manifest(out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings, and conditions by file name, of all processes. The last line of each may be cut short."""
    path = out / MANIFEST
    try:
        first, *entries = _lines(path)
        settings = first["settings"].copy()
        lines = {entry["file"]: entry["condition"] for entry in entries}
        for path in sorted(out.glob(PART.format("*"))):
            lines |= {entry["file"]: entry["condition"] for entry in _lines(path)}
        return settings, lines
    except FileNotFoundError:
        raise ConfigError(f"{out} holds images but no {MANIFEST}: choose another folder") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or "not the manifest of a run"
        raise ConfigError(f"{path}: {reason}") from None


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def _record(path: Path, batch: list[Job]) -> None:
    try:
        with open(path, "a") as file:
            file.write("".join(_line(_entry(job.file, job.condition)) for job in batch))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StarflowError(f"cannot write {path}: {error.strerror}") from None


def _entry(file: str, condition: str | int | None) -> dict[str, Any]:
    return {"file": file, "condition": condition}


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"


def _read(out: Path, jobs: list[Job]) -> torch.Tensor:
    arrays = [np.atleast_3d(np.asarray(Image.open(out / job.file))) for job in jobs]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
