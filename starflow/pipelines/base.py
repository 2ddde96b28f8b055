"""Common parts of the pipelines: noise, sampling, reports, saving."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import torch
from diffusers import ConfigMixin, DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput

from ..data.prompts import image_size
from ..errors import CheckpointError, ConfigError, StarflowError
from ..io.files import permit_reading, write_text
from ..io.tensors import SafetensorError, copy_weights
from ..models.checkpoint import locate, pipeline_class
from ..models.conditions import integers
from ..models.flow import Flow
from ..models.guidance import Guidance
from ..sampling.budget import denoise_bytes
from ..sampling.jobs import Job
from ..sampling.sample import Recorder, SampleOptions, SampleReport, check_finite, draw
from .card import model_card
from .model import FlowModel

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
CALLBACK_TENSORS = ("latents",)
# Memory limit of a backward pass of denoising, which is split to fit.
DENOISE_BYTES = 4 * 2**30

# callback(pipe, step, block, tensors), as in a call, and step_end(pipe, step, block, latents), which returns latents.
StepCallback = Callable[["FlowPipeline", int, int, dict], "dict | None"]
StepEnd = Callable[["FlowPipeline", int, int, torch.Tensor], torch.Tensor]


@dataclasses.dataclass
class FlowPipelineOutput(BaseOutput):
    """Images of a call and how they were drawn.

    Args:
        images: list of PIL images; or (N, H, W, C) numpy or (N, C, H, W) torch on [0, 1]; or the output of the flow.
        report: method, passes, seconds per stage, certificate, and a report per block.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    report: SampleReport


class Condition(NamedTuple):
    """Conditions of a batch: classes (B,), text states (B, L, text_dim), and states that guidance moves away from."""

    labels: torch.Tensor | None = None
    text: torch.Tensor | None = None
    empty_text: torch.Tensor | None = None


class Interrupted(Exception):
    """End of a call that `_interrupt` stops after a block; its argument are the latents (B, C, H, W) of that block."""


class FlowPipeline(DiffusionPipeline):
    """Base of the pipelines. `FlowPipeline.from_pretrained(folder)` opens whichever pipeline a folder holds."""

    transformer: FlowModel
    pixels_per_latent = 1
    # Guidance of a call that does not give any.
    default_guidance = Guidance()
    # The names of diffusers: callbacks or other threads set `_interrupt` to end a call after the current block.
    _callback_tensor_inputs = CALLBACK_TENSORS
    _interrupt = False

    @property
    def interrupt(self) -> bool:
        """Whether the rest of the blocks, denoising and certificate are skipped."""
        return self._interrupt

    @classmethod
    def from_pretrained(cls, folder, **options):
        """Read a folder.

        Args:
            folder: the folder, or the name of a bundled pipeline.
            options: see `diffusers.DiffusionPipeline.from_pretrained`. The weights are copied, so that the files may
                change later; disable_mmap=False maps the files. They are float32 in all parts unless dtype is given.

        Raises:
            CheckpointError: the folder holds no pipeline, another kind of pipeline, or damaged files.
        """
        options.setdefault("disable_mmap", True)
        if "torch_dtype" not in options:
            options.setdefault("dtype", torch.float32)
        folder = str(locate(folder))
        if cls is not FlowPipeline:
            try:
                # transformers refuses the meta device as the default.
                with torch.device("cpu"):
                    pipe = super().from_pretrained(folder, **options)
            except StarflowError:
                raise
            except (OSError, ValueError, RuntimeError, KeyError, AttributeError, SafetensorError) as error:
                raise CheckpointError(f"{folder}: {' '.join(str(error).split())}") from error
            # diffusers does not pass the option on to transformers.
            text_encoder = getattr(pipe, "text_encoder", None)
            if options["disable_mmap"] and text_encoder is not None and "text_encoder" not in options:
                copy_weights(text_encoder)
            return pipe
        name = pipeline_class(folder)
        kinds = {kind.__name__: kind for kind in cls.__subclasses__()}
        if name not in kinds:
            raise CheckpointError(f"{folder} is a {name}, expected {' or '.join(sorted(kinds))}")
        return kinds[name].from_pretrained(folder, **options)

    def save_pretrained(self, folder, *arguments, **options) -> None:
        """Write a folder, with a model card if it has none.

        Args:
            folder: the folder.
            arguments: see `diffusers.DiffusionPipeline.save_pretrained`.
            options: see `diffusers.DiffusionPipeline.save_pretrained`.
        """
        # Folders that they were read from are paths of this machine.
        for module in (self, *self.components.values()):
            if isinstance(module, ConfigMixin):
                module.register_to_config(_name_or_path="")
        super().save_pretrained(folder, *arguments, **options)
        permit_reading(folder)
        if not (card := Path(folder) / "README.md").exists():
            side = self.transformer.config.image_size * self.pixels_per_latent
            name, weight = Path(folder).resolve().name, self.default_guidance.weight
            write_text(card, model_card(type(self).__name__, self.transformer, side, name, weight))

    def size(self, height: int | None, width: int | None, aspect_ratio: str | None) -> tuple[int, int]:
        """Height and width in pixels of a request.

        Args:
            height: height in pixels, by default the one of training.
            width: width in pixels, by default the one of training.
            aspect_ratio: shape at the area of training such as "3:2", in place of height and width.

        Raises:
            ConfigError: the model cannot draw this size.
        """
        config = self.transformer.config
        side, multiple = config.image_size * self.pixels_per_latent, config.patch_size * self.pixels_per_latent
        if aspect_ratio is not None:
            if height is not None or width is not None:
                raise ConfigError("aspect_ratio: give it or height and width")
            height, width = image_size(aspect_ratio, side, multiple)
        height, width = (side if given is None else given for given in (height, width))
        for name, given in (("height", height), ("width", width)):
            if (found := integers(given)) is None or found.ndim or found < multiple or found % multiple:
                raise ConfigError(f"{name}={given}: expected a multiple of {multiple} pixels")
        if config.rotary == "none" and (height, width) != (side, side):
            raise ConfigError(
                f"height={height}, width={width}: a model with a position table draws {side}x{side} alone"
            )
        return int(height), int(width)

    def noise(
        self,
        count: int,
        size: tuple[int, int],
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Draw noise, or check noise that was given.

        Args:
            count: number of images N.
            size: height and width of the images in pixels.
            generator: one generator, or one per image, which makes each image independent of the others.
            latents: noise to use.

        Returns:
            (N, C, H, W) float32 noise on the device of the call.

        Raises:
            ConfigError: the generators do not fit, see `Flow.noise`, or the shape of `latents` is wrong.
        """
        config, device = self.transformer.config, self._execution_device
        latent_size = tuple(length // self.pixels_per_latent for length in size)
        if latents is not None:
            expected = (count, config.image_channels, *latent_size)
            if not isinstance(latents, torch.Tensor) or latents.shape != expected:
                raise ConfigError(f"latents: expected {expected}, got {tuple(getattr(latents, 'shape', ()))}")
            return latents.to(device, torch.float32)
        grid = tuple(length // config.patch_size for length in latent_size)
        return self.transformer.noise(count, generator, grid).to(device)

    def draw(
        self,
        z: torch.Tensor,
        condition: Condition,
        options: SampleOptions,
        recorder: Recorder,
        output_type: str,
        denoise_batch_size: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        after_block: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
    ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        """Map noise to images. The arguments must have been checked.

        Args:
            z: (B, C, H, W) noise.
            condition: conditions of the images.
            options: guidance, solvers, denoising and certificate.
            recorder: takes the times and reports.
            output_type: as in a call.
            denoise_batch_size: as in a call.
            progress: as in a call.
            after_block: called after each block, see `Flow.inverse`.
        """
        flow = self.transformer
        try:
            x = draw(
                flow,
                z,
                options,
                recorder,
                *condition,
                denoise_rows=denoise_batch_size or denoise_rows(flow, math.prod(flow.grid(z))),
                progress=progress,
                after_block=after_block,
            )
        except Interrupted as stop:
            (x,) = stop.args
            recorder.add(len(x), [], None)
        images = x
        if output_type != "latent":
            with recorder.clock("decode"):
                decoded = self.decode(x)
                check_finite(decoded, "decoding")
                images = VaeImageProcessor(do_normalize=False).postprocess(decoded, output_type)
        self.maybe_free_model_hooks()
        return images

    @torch.no_grad()
    def draw_jobs(
        self,
        jobs: list[Job],
        generators: list[torch.Generator],
        recorder: Recorder,
        progress: Callable[[int, int], None] | None,
        *,
        options: SampleOptions,
        size: tuple[int, int],
        latents: bool = False,
        **condition_options,
    ) -> torch.Tensor:
        """Draw a batch of jobs, see `starflow.sampling.many.DrawJobs`.

        Args:
            jobs: the jobs.
            generators: one generator per job.
            recorder: takes the times and reports.
            progress: called as progress(done, total) with tokens.
            options: guidance, solvers, denoising and certificate.
            size: height and width in pixels.
            latents: return the output of the flow in place of pixels.
            condition_options: further arguments of `job_condition`.
        """
        condition = self.job_condition(jobs, options.guidance, recorder, **condition_options)
        z = self.noise(len(jobs), size, generators)
        # The bits of a backward pass depend on its batch, so denoising takes one image at a time.
        images = self.draw(z, condition, options, recorder, "latent" if latents else "pt", 1, progress)
        return images.cpu() if latents else (images.cpu() * 255).round().to(torch.uint8)

    def job_condition(self, jobs: list[Job], guidance: Guidance, recorder: Recorder) -> Condition:
        """Conditions of a batch of jobs."""
        raise NotImplementedError

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, C, H, W) on [0, 1] of the output of the flow."""
        raise NotImplementedError

    def denoise_factor(self, factor: float | None) -> float:
        """Factor of the score step.

        Args:
            factor: the requested factor; None takes the pipeline's own, or 0 for a model trained without noise.

        Raises:
            ConfigError: the model was trained without Gaussian noise.
        """
        if factor is None:
            return self.config.denoise if self.transformer.config.noise_std else 0.0
        if factor and not self.transformer.config.noise_std:
            raise ConfigError(f"denoise={factor}: the model was not trained with Gaussian noise")
        return factor

    def _call(
        self,
        z: torch.Tensor,
        condition: Condition,
        options: SampleOptions,
        recorder: Recorder,
        output_type: str,
        denoise_batch_size: int | None,
        progress: Callable[[int, int], None] | None,
        step_end: StepEnd | None,
        return_dict: bool,
    ) -> FlowPipelineOutput | tuple[list, SampleReport]:
        """Draw with the progress bar of diffusers; return the result of a call."""
        flow = self.transformer

        def after_block(block: int, x: torch.Tensor) -> torch.Tensor:
            if step_end:
                x = step_end(self, len(flow.blocks) - 1 - block, block, x)
            if self._interrupt and block:
                raise Interrupted(x)
            return x

        with self.progress_bar(total=len(flow.blocks) * len(z) * math.prod(flow.grid(z))) as bar:

            def watch(done: int, total: int) -> None:
                bar.update(done - bar.n)
                if progress:
                    progress(done, total)

            images = self.draw(z, condition, options, recorder, output_type, denoise_batch_size, watch, after_block)
        report = recorder.report()
        return FlowPipelineOutput(images, report) if return_dict else (images, report)


def check_call(output_type: str, num_images_per_prompt: int, denoise_batch_size: int | None) -> tuple[int, int | None]:
    """Return the two counts as int. Raises ConfigError for a wrong count or output type."""
    if output_type not in OUTPUT_TYPES:
        raise ConfigError(f"output_type={output_type!r}: expected one of {', '.join(OUTPUT_TYPES)}")
    copies = _positive("num_images_per_prompt", num_images_per_prompt)
    return copies, None if denoise_batch_size is None else _positive("denoise_batch_size", denoise_batch_size)


def _positive(name: str, value: int) -> int:
    """Return an integer of any kind as int. Raises ConfigError, with the name of the argument, if it is less than 1."""
    found = integers(value)
    if found is None or found.ndim or found < 1:
        raise ConfigError(f"{name}={value}: expected an integer of at least 1")
    return int(found)


def as_step_end(callback: StepCallback | None, names: Sequence[str] | None) -> StepEnd | None:
    """Return what runs after a block.

    Args:
        callback: callback of the call.
        names: names of the tensors that the callback takes, of `CALLBACK_TENSORS`.

    Raises:
        ConfigError: a name is unknown.
    """
    # As in diffusers: its own callbacks know their tensors, and None names none.
    named = isinstance(callback, (PipelineCallback, MultiPipelineCallbacks))
    names = callback.tensor_inputs if named else names or ()
    if unknown := [name for name in names if name not in CALLBACK_TENSORS]:
        raise ConfigError(f"callback_on_step_end_tensor_inputs: unknown {', '.join(unknown)}; there are latents alone")
    if callback is None:
        return None

    def step_end(pipe: FlowPipeline, step: int, block: int, x: torch.Tensor) -> torch.Tensor:
        tensors = {"latents": x} if "latents" in names else {}
        return (callback(pipe, step, block, tensors) or {}).get("latents", x)

    return step_end


def denoise_rows(flow: Flow, tokens: int) -> int:
    """Return how many images, at least one, fit into a backward pass of DENOISE_BYTES; tokens: tokens per image."""
    return max(1, DENOISE_BYTES // denoise_bytes(flow, tokens))
