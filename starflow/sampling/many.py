"""Many samples of a flow or a pipeline into files, by one process or more: a killed run goes on where it stopped."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..data.datasets import generator
from ..errors import InverseError, StarflowError
from ..inversion.solvers import BlockReport, Inversion, add_reports, method_of
from ..models.certificate import Certificate, combine
from ..models.flow import Flow, Guidance
from .ledger import Job, Layout, Shard, begin, record
from .processes import Processes
from .sample import draw, pixels, save_grid
from .writers import read_pixels, write_shard

if TYPE_CHECKING:
    from ..pipelines import FlowPipeline

GRID = "grid.png"
GRID_IMAGES = 100


@dataclasses.dataclass(frozen=True)
class GenerationReport:
    """count samples written in `seconds` and kept ones that were there; stages: seconds of each stage, "write" to disk
    among them, these two of the slowest process; the rest as in PipelineReport, over all batches: the most passes, the
    largest certificate, its mean."""

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


class Drawn(NamedTuple):
    """A batch: uint8 pixels or latents (N, C, H, W) on the CPU, seconds of its stages, how exact it is, how it was
    made."""

    values: torch.Tensor
    seconds: dict[str, float]
    certificate: Certificate | None
    blocks: list[BlockReport]


def generate(
    source: Flow | FlowPipeline,
    jobs: list[Job],
    out: Path,
    seed: int,
    batch_size: int,
    options: dict[str, Any],
    settings: dict[str, Any],
    certify: bool = False,
    columns: int = 10,
    layout: Layout = Layout(),
) -> GenerationReport:
    """Write the samples of the jobs and a manifest, but for those that are there; a grid of them where they are few.

    options: arguments of the pipeline's call, for a flow too as far as it has them. settings: what else decides the
    samples, the checkpoint say. Where files are there, these, the seed, the layout and the samples' conditions must be
    those that the folder was begun with, ConfigError otherwise; but for how the flow is inverted, to the same
    tolerance. A shard that is damaged is drawn again, with a warning. StarflowError where a file cannot be written.

    Under torchrun every process calls this and draws its share of what is left, in batches of batch_size but the last;
    the report is that of all.
    """
    processes, shards = Processes(), layout.shards(jobs)
    settings = json.loads(json.dumps({**settings, "seed": seed, **options, **layout.settings}))
    kept = processes.first(lambda: begin(out, shards, settings))
    missing = [shard for shard in shards if shard.file not in kept]
    todo = missing[processes.rank :: processes.count]
    try:
        options = {**options, "certify": certify}
        drawn = _draw_all(source, todo, out, seed, batch_size, options, processes.rank, layout.latents)
    except StarflowError as error:
        where = f"process {processes.rank} of {processes.count}: " if processes.count > 1 else ""
        raise type(error)(f"{where}{error}") from None
    parts = processes.gather(drawn)
    if processes.count > 1:
        processes.first(lambda: begin(out, shards, settings, check=False))
    if len(jobs) <= GRID_IMAGES and processes.rank == 0 and not layout.latents:
        images = torch.cat([read_pixels(out / shard.file)[: len(shard.jobs)] for shard in shards])
        save_grid(images, out / GRID, columns)
    return _report(parts, sum(len(shard.jobs) for shard in missing), len(jobs))


def _draw_all(
    source: Flow | FlowPipeline,
    todo: list[Shard],
    out: Path,
    seed: int,
    batch_size: int,
    options: dict[str, Any],
    rank: int,
    latents: bool,
) -> tuple[float, dict[str, float], list[BlockReport], list[tuple[Certificate, int]]]:
    """Draw and write what is to do; seconds, those of the stages, reports of the blocks, certificates."""
    stages: dict[str, float] = {}
    blocks, errors, start = [], [], time.perf_counter()
    # A batch may end one file and begin the next.
    queue, files, rows = [job for shard in todo for job in shard.jobs], collections.deque(todo), collections.deque()
    for first in range(0, len(queue), batch_size):
        batch = queue[first : first + batch_size]
        if not isinstance(source, Flow):
            text, hidden = f"{first + len(batch)} of {len(queue)} images", rank > 0 or not sys.stderr.isatty()
            source.set_progress_bar_config(desc=text, leave=False, disable=hidden)
        try:
            drawn = _draw(source, batch, seed, options, latents)
        except InverseError as error:
            raise InverseError(f"{batch[0].file} to {batch[-1].file}: {error}") from None
        ended = time.perf_counter()
        rows.extend(drawn.values)
        entries = []
        while files and len(files[0].jobs) <= len(rows):
            shard = files.popleft()
            values = torch.stack([rows.popleft() for _ in shard.jobs])
            entries.append(shard.entry(write_shard(out, shard, values)))
        if entries:
            record(out, rank, entries)
        seconds = {**drawn.seconds, "write": time.perf_counter() - ended}
        stages = {name: stages.get(name, 0.0) + value for name, value in seconds.items()}
        blocks = add_reports(blocks, drawn.blocks)
        if drawn.certificate is not None:
            errors.append((drawn.certificate, len(batch)))
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


def _draw(
    source: Flow | FlowPipeline, batch: list[Job], seed: int, options: dict[str, Any], latents: bool = False
) -> Drawn:
    generators = [generator(seed, job.index, job.copy) for job in batch]
    return (_draw_flow if isinstance(source, Flow) else _draw_pipeline)(source, batch, generators, options, latents)


def _draw_flow(
    flow: Flow, batch: list[Job], generators: list[torch.Generator], options: dict[str, Any], latents: bool
) -> Drawn:
    defaults = {"guidance_scale": 0.0, "guidance_rule": "tarflow", "annealed": False, "attention_temperature": 1.0}
    given = {**defaults, "method": "auto", "window": None, "tol": None, "quantize": "none", **options}
    labels = None
    if batch[0].condition is not None:
        labels = torch.tensor([job.condition for job in batch], device=flow.device)
    x, stages, certificate, blocks = draw(
        flow,
        flow.noise(len(batch), generators),
        labels,
        Guidance(*(given[name] for name in defaults)),
        Inversion(given["method"], given["window"], given["tol"], given["quantize"]),
        given.get("denoise", 0.0),
        given["certify"],
        denoise_batch_size=1,
    )
    return Drawn(x.cpu() if latents else pixels(flow, x), stages, certificate, blocks)


def _draw_pipeline(
    pipe: FlowPipeline, batch: list[Job], generators: list[torch.Generator], options: dict[str, Any], latents: bool
) -> Drawn:
    conditions = [job.condition for job in batch]
    if isinstance(conditions[0], str):
        given = {"prompt": conditions}
    elif pipe.transformer.config.num_classes:
        given = {"class_labels": [-1 if number is None else number for number in conditions]}
    else:
        given = {"num_images_per_prompt": len(batch)}
    # Backward passes of denoising have bits that depend on their batch.
    options = {**options, "denoise_batch_size": 1, "output_type": "latent" if latents else "pt"}
    images, report = pipe(**given, **options, generator=generators, return_dict=False)
    values = images.cpu() if latents else (images.cpu() * 255).round().to(torch.uint8)
    exact = None if report.certificate is None else Certificate(report.certificate, report.certificate_mean)
    return Drawn(values, report.seconds, exact, report.blocks)
