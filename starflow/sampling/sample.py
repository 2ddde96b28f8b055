"""Samples of a flow, drawn in batches, and a report of how they were drawn."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from starflow_kernels._core.checks import all_finite

from ..data.datasets import to_pixels
from ..errors import ConfigError, InverseError
from ..inversion.clock import Clock
from ..inversion.reports import BlockReport, add_reports, block_reports, method_of
from ..inversion.request import Inversion
from ..models.certificate import Certificate, certificate, combine
from ..models.conditions import check_conditions
from ..models.flow import Flow
from ..models.guidance import Guidance
from ..seeds import generator
from ..settings import check_count, check_types

STAGES = ("text", "flow", "certify", "denoise", "decode", "write")


@dataclasses.dataclass(frozen=True)
class SampleOptions:
    """Options of sampling.

    Args:
        guidance: guidance toward a class or prompt.
        inversion: solvers and their tolerance.
        denoise: factor of a step along the score after sampling, see `Flow.denoise`; 0 for none.
        certify: map the samples back to noise and report the largest difference.

    Raises:
        ConfigError: `denoise` is negative or not finite.
    """

    guidance: Guidance = dataclasses.field(default_factory=Guidance)
    inversion: Inversion = dataclasses.field(default_factory=Inversion)
    denoise: float = 0.0
    certify: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 <= self.denoise < math.inf:
            raise ConfigError(f"denoise={self.denoise}: expected a finite factor of at least 0")

    def to_json(self) -> dict[str, Any]:
        """Return the options as a flat mapping, named like the flags of `starflow sample`."""
        guidance, inversion = self.guidance, self.inversion
        return {
            "guidance": guidance.weight,
            "guidance_rule": guidance.rule,
            "annealed": guidance.annealed,
            "attention_temperature": guidance.temperature,
            "method": inversion.method,
            "window": inversion.window,
            "tol": inversion.tolerance,
            "quantize": inversion.quantize,
            "denoise": self.denoise,
            "certify": self.certify,
        }


@dataclasses.dataclass(frozen=True)
class SampleReport:
    """Report of how samples were drawn.

    Args:
        count: samples drawn.
        kept: samples that a folder already held and that were not drawn again.
        seconds: wall time; of the slowest process where several took part.
        stages: seconds per stage: "text", "flow", "certify", "denoise", "decode", "write".
        certificate: largest difference between the noise and the samples mapped back to noise, before denoising; None
            if it was not requested or does not exist.
        certificate_mean: mean difference.
        blocks: one report per block of the flow.
    """

    count: int
    kept: int
    seconds: float
    stages: dict[str, float]
    certificate: float | None
    certificate_mean: float | None
    blocks: list[BlockReport]

    @property
    def method(self) -> str:
        """Method of the solvers; "sequential" if no block used another one."""
        return method_of(self.blocks)

    @property
    def steps(self) -> int:
        """Network passes, one after the other, in all blocks together."""
        return sum(block.passes for block in self.blocks)

    @property
    def images_per_second(self) -> float:
        """Samples drawn per second."""
        return self.count / self.seconds

    def __str__(self) -> str:
        """Return one line with the time, and one with the certificate if there is one."""
        kept = f" ({self.kept} {'was' if self.kept == 1 else 'were'} there)" if self.kept else ""
        rate = self.images_per_second
        speed = f"{rate:.0f} per second" if rate >= 10 else f"{rate:.2g} per second"
        images = f"{self.count} image{'' if self.count == 1 else 's'}"
        text = f"{images}{kept} in {self.seconds:.2f} s ({speed})"
        if self.certificate is not None:
            text += f"\ncertificate: max |flow(x) - z| = {self.certificate:.1e}, mean {self.certificate_mean:.1e}"
        return text

    def to_json(self) -> dict[str, Any]:
        """Return all numbers as a mapping."""
        derived = {name: getattr(self, name) for name in ("method", "steps", "images_per_second")}
        return {**dataclasses.asdict(self), **derived}


class Samples(NamedTuple):
    """uint8 images (N, C, H, W) on the CPU, and how they were drawn."""

    images: torch.Tensor
    report: SampleReport


class Recorder:
    """Collects what the batches of a run take.

    Args:
        device: device of the flow.
    """

    def __init__(self, device: torch.device):
        self.clock = Clock(device, STAGES)
        self._start = time.perf_counter()
        self._count = 0
        self._blocks: list[BlockReport] = []
        self._certificates: list[tuple[Certificate, int]] = []

    def add(self, count: int, blocks: list[BlockReport], exact: Certificate | None) -> None:
        """Add a batch of `count` samples."""
        self._count += count
        self._blocks = add_reports(self._blocks, blocks)
        if exact is not None:
            self._certificates.append((exact, count))

    def report(self) -> SampleReport:
        """Return the report of all batches until now."""
        seconds = time.perf_counter() - self._start
        exact = combine(self._certificates)
        return SampleReport(self._count, 0, seconds, dict(self.clock.seconds), *exact, self._blocks)


def merge_reports(reports: Sequence[SampleReport], kept: int) -> SampleReport:
    """Report of processes that worked at the same time, `kept` samples aside."""
    exact = [
        (Certificate(report.certificate, report.certificate_mean), report.count)
        for report in reports
        if report.certificate is not None
    ]
    blocks: list[BlockReport] = []
    for report in reports:
        blocks = add_reports(blocks, report.blocks)
    return SampleReport(
        sum(report.count for report in reports),
        kept,
        max(report.seconds for report in reports),
        {stage: max(report.stages[stage] for report in reports) for stage in STAGES},
        *combine(exact),
        blocks,
    )


def check_finite(x: torch.Tensor, stage: str) -> None:
    """Raise InverseError if a sample of a batch (B, ...) is not finite after a stage of sampling."""
    if not all_finite(x):
        bad = x.flatten(1).isfinite().all(1).logical_not().nonzero()[0].item()
        raise InverseError(f"{stage}: values of sample {bad} are not finite")


@torch.no_grad()
def draw(
    flow: Flow,
    z: torch.Tensor,
    options: SampleOptions,
    recorder: Recorder,
    labels: torch.Tensor | None = None,
    text: torch.Tensor | None = None,
    empty_text: torch.Tensor | None = None,
    *,
    denoise_rows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    after_block: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Draw one batch.

    Args:
        flow: the flow.
        z: (B, C, H, W) noise.
        options: guidance, solvers, denoising and certificate.
        recorder: takes the times, the certificate and the reports of the blocks.
        labels: (B,) int64 classes, -1 for no class.
        text: (B, L, text_dim) text states.
        empty_text: (B or 1, L, text_dim) states that guidance moves away from.
        denoise_rows: samples per backward pass of denoising, by default all.
        progress: called as progress(done, total) with tokens of all blocks.
        after_block: called after each block, see `Flow.inverse`.

    Returns:
        (B, C, H, W) images or latents, denoised.

    Raises:
        InverseError: values are not finite.
    """
    guidance, clock = options.guidance, recorder.clock
    with clock("flow"):
        solvers = options.inversion.solvers(flow, z, guidance)
        found = flow.inverse(
            z, labels, text, guidance, empty_text, progress=progress, after_block=after_block, solvers=solvers,
            quantize=options.inversion.quantize,
        )  # fmt: skip
    x, reports = found.x, found.reports
    del found  # it holds the results of all blocks
    exact = None
    if options.certify:
        with clock("certify"):
            exact = certificate(flow, x, z, labels, text, guidance, empty_text)
    if options.denoise:
        with clock("denoise"):
            rows = denoise_rows or len(x)
            parts = ([None] * len(x) if part is None else part.split(rows) for part in (labels, text))
            x = torch.cat([flow.denoise(*batch, factor=options.denoise) for batch in zip(x.split(rows), *parts)])
        check_finite(x, "denoising")
    recorder.add(len(x), block_reports(solvers, reports), exact)
    return x


def sample(
    flow: Flow,
    count: int,
    labels: torch.Tensor | None = None,
    *,
    seed: int = 0,
    batch_size: int = 256,
    options: SampleOptions = SampleOptions(),
    progress: Callable[[int, int], None] | None = None,
) -> Samples:
    """Draw images of a flow on pixels.

    Args:
        flow: the flow.
        count: number of images N.
        labels: (N,) int64 classes, -1 for no class.
        seed: seed of the noise, which does not depend on the batch size.
        batch_size: images per batch.
        options: guidance, solvers, denoising and certificate.
        progress: called as progress(done, total) with tokens of all blocks and images.

    Raises:
        ConfigError: the flow is on latents, denoising is requested of a model trained without noise, or `count` or
            `batch_size` is no integer of at least 1.
        InverseError: values are not finite.
        ValueError: `labels` does not fit.
    """
    check_pixels(flow)
    count, batch_size = check_count("count", count), check_count("batch_size", batch_size)
    if options.denoise and not flow.config.noise_std:
        raise ConfigError(f"denoise={options.denoise}: the model was not trained with Gaussian noise")
    noise = flow.noise(count, generator(seed))
    labels = check_conditions(flow.config, labels, None, noise)
    recorder, images = Recorder(flow.device), []
    for z, rows in zip(noise.split(batch_size), torch.arange(count, dtype=torch.int64, device="cpu").split(batch_size)):
        batch_labels = None if labels is None else labels[rows]

        def watch(done: int, total: int, first: int = int(rows[0]), size: int = len(z)) -> None:
            progress(first * (total // size) + done, count * (total // size))

        try:
            x = draw(flow, z, options, recorder, batch_labels, progress=progress and watch)
        except InverseError as error:
            raise InverseError(f"images {rows[0]} to {rows[-1]}: {error}") from None
        images.append(pixels(flow, x))
    return Samples(torch.cat(images), recorder.report())


def pixels(flow: Flow, x: torch.Tensor) -> torch.Tensor:
    """Convert samples of a flow to uint8 images (N, C, H, W) on the CPU."""
    return to_pixels(x, flow.config.levels, flow.config.noise_std)


def check_pixels(flow: Flow) -> None:
    """Raise ConfigError for a flow on latents."""
    if not flow.config.levels:
        raise ConfigError("this flow is on latents: draw from it with the pipeline that has their autoencoder")
