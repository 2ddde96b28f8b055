"""Samples of a flow, with a report of how they were made, and grids of them as PNG."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from ..data.datasets import generator, to_pixels
from ..errors import ConfigError, InverseError
from ..inversion.solvers import BlockReport, Inversion, add_reports, block_reports, method_of
from ..io.files import write_atomically
from ..models.certificate import Certificate, certificate, combine
from ..models.flow import Flow, Guidance

MIN_GRID_PIXELS = 512


@dataclasses.dataclass(frozen=True)
class SampleReport:
    """count images in `seconds`.

    method: that was used. steps: network passes, one after the other, in all blocks together. certificate,
    certificate_mean: see `starflow.certificate`, over the samples before denoising, None where it was not asked for or
    cannot be had. blocks: what each block took.
    """

    count: int
    method: str
    steps: int
    seconds: float
    images_per_second: float
    certificate: float | None
    certificate_mean: float | None
    blocks: list[BlockReport]


class Samples(NamedTuple):
    """images: uint8 (N, C, H, W) on the CPU."""

    images: torch.Tensor
    report: SampleReport


def sample(
    flow: Flow,
    count: int,
    labels: torch.Tensor | None = None,
    guidance: Guidance = Guidance(),
    seed: int = 0,
    batch_size: int = 256,
    denoise: float = 0.0,
    certify: bool = False,
    progress: Callable[[int, int], None] | None = None,
    inversion: Inversion = Inversion(),
) -> Samples:
    """Draw images.

    labels: int64 (count,). seed: all noise comes from it, whatever the batch size. batch_size: images at a time.
    denoise: factor of a step along the score after sampling, see Flow.denoise; 0 for none.
    progress: see Flow.inverse, over all images. inversion: how the flow is inverted.

    Raises ConfigError for a flow on latents: a pipeline, which has their autoencoder, draws from it. InverseError where
    images are not finite.
    """
    check_pixels(flow)
    noise = flow.noise(count, generator(seed))
    start, parts, errors, blocks = time.perf_counter(), [], [], []
    for z, rows in zip(noise.split(batch_size), torch.arange(count).split(batch_size)):
        batch_labels = None if labels is None else labels[rows].to(flow.device)

        def watch(done: int, total: int, first: int = int(rows[0]), size: int = len(z)) -> None:
            progress(first * (total // size) + done, count * (total // size))

        try:
            x, _, error, reports = draw(
                flow, z, batch_labels, guidance, inversion, denoise, certify, progress=progress and watch
            )
        except InverseError as error:
            raise InverseError(f"images {rows[0]} to {rows[-1]}: {error}") from None
        blocks = add_reports(blocks, reports)
        if error is not None:
            errors.append((error, len(z)))
        parts.append(pixels(flow, x))
    seconds = time.perf_counter() - start
    report = SampleReport(
        count,
        method_of(blocks),
        sum(block.passes for block in blocks),
        seconds,
        count / seconds,
        *combine(errors),
        blocks,
    )
    return Samples(torch.cat(parts), report)


def draw(
    flow: Flow,
    z: torch.Tensor,
    labels: torch.Tensor | None,
    guidance: Guidance,
    inversion: Inversion,
    denoise: float = 0.0,
    certify: bool = False,
    denoise_batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[torch.Tensor, dict[str, float], Certificate | None, list[BlockReport]]:
    """One batch of noise z (B, C, H, W): images or latents like z, seconds of each stage, certificate, blocks.

    denoise_batch_size: images in a backward pass of denoising, by default all.
    """
    times = [time.perf_counter()]
    solvers = inversion.solvers(flow, z, guidance)
    x, reports = flow.inverse(
        z,
        labels,
        guidance=guidance,
        progress=progress,
        solvers=solvers,
        quantize=inversion.quantize,
        return_reports=True,
    )
    times.append(time.perf_counter())
    error = certificate(flow, x, z, labels, guidance=guidance) if certify else None
    times.append(time.perf_counter())
    if denoise:
        rows = denoise_batch_size or len(x)
        labels_of = [None] * len(x) if labels is None else labels.split(rows)
        x = torch.cat([flow.denoise(*batch, factor=denoise) for batch in zip(x.split(rows), labels_of)])
    times.append(time.perf_counter())
    stages = {name: end - start for name, start, end in zip(("flow", "certify", "denoise"), times, times[1:])}
    return x, stages, error, block_reports(solvers, reports)


def pixels(flow: Flow, x: torch.Tensor) -> torch.Tensor:
    """uint8 images (N, C, H, W) on the CPU of what a flow made."""
    return to_pixels(x, flow.config.levels, flow.config.noise_std)


def check_pixels(flow: Flow) -> None:
    """Raise ConfigError for a flow on latents."""
    if not flow.config.levels:
        raise ConfigError("this flow is on latents: draw from it with the pipeline that has their autoencoder")


def image_grid(images: torch.Tensor, columns: int) -> Image.Image:
    """uint8 images (N, C, H, W), C 1 or 3, as one, a pixel apart; a small one is enlarged by an integer."""
    count, channels, height, width = images.shape
    rows = math.ceil(count / columns)
    canvas = torch.full((channels, rows * (height + 1) - 1, columns * (width + 1) - 1), 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + 1), (i % columns) * (width + 1)
        canvas[:, top : top + height, left : left + width] = image
    return _image(canvas, max(1, MIN_GRID_PIXELS // canvas.shape[2]))


def save_grid(images: torch.Tensor, path: Path, columns: int) -> None:
    """Write the `image_grid` of images as PNG."""
    _save(image_grid(images, columns), path)


def save_image(image: torch.Tensor, path: Path) -> None:
    """Write a uint8 image (C, H, W), C 1 or 3, as PNG."""
    _save(_image(image), path)


def _image(pixels: torch.Tensor, scale: int = 1) -> Image.Image:
    enlarged = pixels.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    return Image.fromarray(enlarged.permute(1, 2, 0).squeeze(-1).numpy())


def _save(image: Image.Image, path: Path) -> None:
    write_atomically(path, lambda temporary: image.save(temporary, format="PNG"))
