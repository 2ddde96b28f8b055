"""What the pipelines share: noise, sampling, certificate, denoising, timing, saving."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from safetensors import SafetensorError

from ..data.prompts import image_size
from ..errors import CheckpointError, ConfigError, StarflowError
from ..inversion.solvers import BlockReport, Inversion, block_reports, method_of
from ..io.files import write_text
from ..models.certificate import certificate, combine
from ..models.checkpoint import PIPELINE_INDEX
from ..models.flow import Flow, Guidance
from ..sampling.budget import denoise_bytes
from .card import model_card
from .model import FlowModel

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
STAGES = ("text", "flow", "certify", "denoise", "decode")
# The backward pass of denoising is split to fit.
DENOISE_BYTES = 4 * 2**30


@dataclasses.dataclass(frozen=True)
class PipelineReport:
    """How images were made.

    method: that was used. steps: network passes of the flow, one after the other, for the whole batch at once. seconds:
    by stage, "text", "flow", "certify", "denoise", "decode". certificate, certificate_mean: see `starflow.certificate`,
    before denoising; None where it was not asked for or cannot be had. blocks: what each block of the flow took.
    """

    method: str
    steps: int
    seconds: dict[str, float]
    certificate: float | None
    certificate_mean: float | None
    blocks: list[BlockReport]


@dataclasses.dataclass
class FlowPipelineOutput(BaseOutput):
    """images: a list of PIL images, or (N, H, W, C) numpy or (N, C, H, W) torch on [0, 1], or the flow's output."""

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    report: PipelineReport


@dataclasses.dataclass
class Options:
    """Arguments of a call that are the same for every pipeline."""

    copies: int
    output_type: str
    guidance: Guidance
    inversion: Inversion
    denoise: float | None
    denoise_batch_size: int | None
    certify: bool
    progress: Callable[[int, int], None] | None
    callback_on_step_end: Callable[[FlowPipeline, int, int, dict], dict | None] | None

    def __post_init__(self):
        if not isinstance(self.copies, int) or self.copies < 1:
            raise ConfigError(f"num_images_per_prompt={self.copies}: expected an integer of at least 1")
        if self.output_type not in OUTPUT_TYPES:
            raise ConfigError(f"output_type={self.output_type!r}: expected one of {', '.join(OUTPUT_TYPES)}")


class FlowPipeline(DiffusionPipeline):
    """Base of the pipelines. `FlowPipeline.from_pretrained(folder)` opens whichever of them a folder holds."""

    transformer: FlowModel
    pixels_a_latent = 1

    @classmethod
    def from_pretrained(cls, folder, **options):
        """Read a folder, see `diffusers.DiffusionPipeline.from_pretrained`."""
        if cls is not FlowPipeline:
            try:
                return super().from_pretrained(folder, **options)
            except StarflowError:
                raise
            except (OSError, ValueError, RuntimeError, KeyError, AttributeError, SafetensorError) as error:
                raise CheckpointError(f"{folder}: {' '.join(str(error).split())}") from error
        name = pipeline_class(folder)
        kinds = {kind.__name__: kind for kind in cls.__subclasses__()}
        if name not in kinds:
            raise CheckpointError(f"{folder} is a {name}, expected {' or '.join(sorted(kinds))}")
        return kinds[name].from_pretrained(folder, **options)

    def save_pretrained(self, folder, *arguments, **options) -> None:
        """Write a folder, see `diffusers.DiffusionPipeline.save_pretrained`; a model card where there is none."""
        super().save_pretrained(folder, *arguments, **options)
        if not (card := Path(folder) / "README.md").exists():
            side = self.transformer.config.image_size * self.pixels_a_latent
            write_text(card, model_card(type(self).__name__, self.transformer, side, Path(folder).resolve().name))

    def size(self, height: int | None, width: int | None, aspect_ratio: str | None) -> tuple[int, int]:
        """(height, width) in pixels of what was asked for, the size of training by default."""
        config = self.transformer.config
        side, multiple = config.image_size * self.pixels_a_latent, config.patch_size * self.pixels_a_latent
        if aspect_ratio is not None:
            if height is not None or width is not None:
                raise ConfigError("aspect_ratio: give it or height and width")
            height, width = image_size(aspect_ratio, side, multiple)
        height, width = (side if given is None else given for given in (height, width))
        for name, given in (("height", height), ("width", width)):
            if not isinstance(given, int) or given < multiple or given % multiple:
                raise ConfigError(f"{name}={given}: expected a multiple of {multiple} pixels")
        if config.rotary == "none" and (height, width) != (side, side):
            raise ConfigError(
                f"height={height}, width={width}: a model with a position table draws {side}x{side} alone"
            )
        return height, width

    def noise(
        self,
        count: int,
        size: tuple[int, int],
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
    ) -> torch.Tensor:
        """(count, C, H, W) float32 noise for images of `size`; with a generator each, it does not depend on count."""
        config, device = self.transformer.config, self._execution_device
        latent_size = tuple(length // self.pixels_a_latent for length in size)
        if latents is not None:
            expected = (count, config.image_channels, *latent_size)
            if not isinstance(latents, torch.Tensor) or latents.shape != expected:
                raise ConfigError(f"latents: expected {expected}, got {tuple(getattr(latents, 'shape', ()))}")
            return latents.to(device, torch.float32)
        grid = tuple(length // config.patch_size for length in latent_size)
        if isinstance(generator, (list, tuple)) and len(generator) != count:
            raise ConfigError(f"generator: {len(generator)} of them for {count} images")
        return self.transformer.noise(count, generator, grid).to(device)

    def draw(
        self,
        z: torch.Tensor,
        labels: torch.Tensor | None,
        text: torch.Tensor | None,
        empty_text: torch.Tensor | None,
        options: Options,
        clock: Clock,
    ) -> tuple[torch.Tensor, PipelineReport]:
        """Images or latents (B, C, H, W) of noise, denoised, and the report so far."""
        flow, guidance = self.transformer, options.guidance
        factor = self.denoise_factor(options.denoise)
        with clock("flow"), self.progress_bar(total=len(flow.blocks) * len(z) * math.prod(flow.grid(z))) as bar:
            solvers = options.inversion.solvers(flow, z, guidance)
            x, reports = flow.inverse(
                z,
                labels,
                text,
                guidance,
                empty_text,
                solvers=solvers,
                quantize=options.inversion.quantize,
                return_reports=True,
                progress=lambda done, total: self._report(bar, done, total, options.progress),
                after_block=lambda block, x: self._step_end(block, x, options.callback_on_step_end),
            )
        errors = []
        if options.certify:
            with clock("certify"):
                found = certificate(flow, x, z, labels, text, guidance, empty_text)
                errors = [] if found is None else [(found, len(z))]
        if factor:
            with clock("denoise"):
                rows = options.denoise_batch_size or denoise_rows(flow, math.prod(flow.grid(z)))
                parts = (None if part is None else part.split(rows) for part in (labels, text))
                labels_of, text_of = (part or [None] * len(x) for part in parts)
                x = torch.cat([flow.denoise(*batch, factor=factor) for batch in zip(x.split(rows), labels_of, text_of)])
        blocks = block_reports(solvers, reports)
        steps = sum(block.passes for block in blocks)
        return x, PipelineReport(method_of(blocks), steps, clock.seconds, *combine(errors), blocks)

    def denoise_factor(self, factor: float | None) -> float:
        """Factor of the score step: as asked for, or the pipeline's own, 0 for a model without noise."""
        if factor is None:
            return self.config.denoise if self.transformer.config.noise_std else 0.0
        if not 0 <= factor < math.inf:
            raise ConfigError(f"denoise={factor}: expected a factor >= 0 of the score step, about 1")
        if factor and not self.transformer.config.noise_std:
            raise ConfigError(f"denoise={factor}: the model was not trained with Gaussian noise")
        return factor

    def _report(self, bar, done: int, total: int, progress: Callable[[int, int], None] | None) -> None:
        bar.update(done - bar.n)
        if progress:
            progress(done, total)

    def _step_end(self, block: int, x: torch.Tensor, callback: Callable | None) -> torch.Tensor:
        if callback is None:
            return x
        step = len(self.transformer.blocks) - 1 - block
        return (callback(self, step, block, {"latents": x}) or {}).get("latents", x)


class Clock:
    """Seconds by stage; the device is waited for at both ends of one."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time what happens inside as a part of `stage`."""
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[stage] += time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


def pipeline_class(folder) -> str:
    """Name of the class in a folder's model_index.json. Raises CheckpointError where there is none."""
    index = Path(folder) / PIPELINE_INDEX
    try:
        return str(json.loads(index.read_text())["_class_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index}: {getattr(error, 'strerror', None) or 'not the index of a pipeline'}") from None


def as_output(images: torch.Tensor, output_type: str):
    """Images (N, C, H, W) on [0, 1] as PIL, numpy or torch."""
    return VaeImageProcessor(do_normalize=False).postprocess(images, output_type)


def denoise_rows(flow: Flow, tokens: int) -> int:
    """Images whose backward pass fits into DENOISE_BYTES, at least one."""
    return max(1, DENOISE_BYTES // denoise_bytes(flow, tokens))
