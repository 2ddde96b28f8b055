"""Many samples into files, by one process or several; a killed run continues where it stopped."""

from __future__ import annotations

import collections
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..errors import InverseError, StarflowError
from ..io.images import save_grid
from ..models.flow import Flow
from .jobs import Job, Layout, SampleFile
from .ledger import begin, entry, record
from .processes import Processes
from .sample import Recorder, SampleOptions, SampleReport, draw, merge_reports, pixels
from .writers import read_pixels, write_samples

GRID = "grid.png"
GRID_IMAGES = 100
BAR = "{percentage:3.0f}% {bar} {n:.0f} of {total} images [{elapsed}<{remaining}]"

# Called as draw_jobs(jobs, generators, recorder, progress): draws a batch, each job with its own generator, reports to
# the recorder, and calls progress(done, total) with tokens. Returns (N, C, H, W) uint8 images or latents on the CPU.
DrawJobs = Callable[[list[Job], list[torch.Generator], Recorder, "Callable[[int, int], None] | None"], torch.Tensor]


def generate(
    draw_jobs: DrawJobs,
    jobs: list[Job],
    out: Path,
    seed: int,
    batch_size: int,
    settings: dict[str, Any],
    *,
    device: torch.device,
    columns: int = 10,
    layout: Layout = Layout(),
) -> SampleReport:
    """Write the samples of the jobs that a folder does not hold yet, a ledger, and a grid if there are few.

    Under torchrun every process calls this function and draws its part. All of them get the report of the whole run.

    Args:
        draw_jobs: draws a batch.
        jobs: the samples.
        out: folder of the run.
        seed: seed of the run.
        batch_size: samples per batch; the last batch may be smaller.
        settings: everything else that determines the samples, such as the checkpoint and the options.
        device: device of the flow.
        columns: images per row of the grid.
        layout: how samples are written.

    Raises:
        ConfigError: the folder was begun with other settings, seed, layout or samples.
        InverseError: values are not finite.
        StarflowError: A file cannot be written.

    Warns:
        UserWarning: A file is damaged, and is drawn again.
    """
    processes, files = Processes(), layout.files(jobs)
    settings = json.loads(json.dumps({**settings, "seed": seed, **layout.settings}))
    present = processes.first(lambda: begin(out, files, settings))
    missing = [file for file in files if file.name not in present]
    queue = missing[processes.rank :: processes.count]
    try:
        report = _draw_all(draw_jobs, queue, out, seed, batch_size, processes.rank, Recorder(device))
    except StarflowError as error:
        where = f"process {processes.rank} of {processes.count}: " if processes.count > 1 else ""
        raise type(error)(f"{where}{error}") from None
    reports = processes.gather(report)
    if processes.count > 1:
        processes.first(lambda: begin(out, files, settings, check=False))
    if 0 < len(jobs) <= GRID_IMAGES and processes.rank == 0 and not layout.latents:
        images = torch.cat([read_pixels(out / file.name)[: len(file.jobs)] for file in files])
        save_grid(images, out / GRID, columns)
    return merge_reports(reports, kept=len(jobs) - sum(len(file.jobs) for file in missing))


def draw_flow_jobs(
    jobs: list[Job],
    generators: list[torch.Generator],
    recorder: Recorder,
    progress: Callable[[int, int], None] | None,
    *,
    flow: Flow,
    options: SampleOptions,
    latents: bool = False,
) -> torch.Tensor:
    """Draw a batch of jobs of a flow, see `DrawJobs`."""
    labels = None
    if jobs[0].condition is not None:
        labels = torch.tensor([job.condition for job in jobs], dtype=torch.int64, device=flow.device)
    # The bits of a backward pass depend on its batch, so denoising takes one image at a time.
    x = draw(flow, flow.noise(len(jobs), generators), options, recorder, labels, denoise_rows=1, progress=progress)
    return x.cpu() if latents else pixels(flow, x)


class ProgressBar:
    """Progress bar of images on stderr; hidden without a terminal.

    Args:
        images: number of images.
        hidden: hide the bar with a terminal too.
    """

    def __init__(self, images: int, hidden: bool = False):
        self._bar = tqdm(total=images, disable=hidden or None, leave=False, bar_format=BAR)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error) -> None:
        self._bar.close()

    def of_batch(self, first: int, size: int) -> Callable[[int, int], None] | None:
        """Return progress(done, total) for a batch of `size` images after the `first` ones; None if hidden."""
        if self._bar.disable:
            return None
        return lambda done, total: self._bar.update(first + size * done / total - self._bar.n)


def _draw_all(
    draw_jobs: DrawJobs,
    files: list[SampleFile],
    out: Path,
    seed: int,
    batch_size: int,
    rank: int,
    recorder: Recorder,
) -> SampleReport:
    """Draw and write the samples of files."""
    # A batch may end one file and begin the next.
    queue, waiting, rows = [job for file in files for job in file.jobs], collections.deque(files), collections.deque()
    with ProgressBar(len(queue), hidden=rank > 0) as bar:
        for first in range(0, len(queue), batch_size):
            batch = queue[first : first + batch_size]
            generators, progress = [job.generator(seed) for job in batch], bar.of_batch(first, len(batch))
            try:
                rows.extend(draw_jobs(batch, generators, recorder, progress))
            except InverseError as error:
                raise InverseError(f"{batch[0].image_file} to {batch[-1].image_file}: {error}") from None
            with recorder.clock("write"):
                entries = []
                while waiting and len(waiting[0].jobs) <= len(rows):
                    file = waiting.popleft()
                    values = torch.stack([rows.popleft() for _ in file.jobs])
                    entries.append(entry(file, write_samples(out, file, values)))
                if entries:
                    record(out, rank, entries)
    return recorder.report()
