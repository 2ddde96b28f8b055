"""Class-conditional and unconditional images by a flow on pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from starflow_kernels.spec import GuidanceRule, Quantize

from ..data.datasets import to_pixels
from ..errors import ConfigError
from ..inversion.request import Inversion
from ..models.conditions import Labels, integers
from ..models.guidance import Guidance
from ..sampling.jobs import Job
from ..sampling.sample import Recorder, SampleOptions, SampleReport
from .base import Condition, FlowPipeline, FlowPipelineOutput, StepCallback, as_step_end, check_call
from .model import FlowModel


class TarFlowPipeline(FlowPipeline):
    """Images of a TarFlow (arXiv 2412.06329), with classes or without.

    Args:
        transformer: the flow.
        denoise: factor of the score step that calls use by default. A model that was trained on uniformly dequantized
            data uses none.
    """

    model_cpu_offload_seq = "transformer"

    def __init__(self, transformer: FlowModel, denoise: float = 1.0):
        super().__init__()
        self.register_modules(transformer=transformer)
        self.register_to_config(denoise=denoise)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels | int | None = None,
        height: int | None = None,
        width: int | None = None,
        aspect_ratio: str | None = None,
        guidance_scale: float = 0.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
        progress: Callable[[int, int], None] | None = None,
        method: str = "auto",
        window: int | None = None,
        tol: float | None = None,
        quantize: Quantize = "none",
        guidance_rule: GuidanceRule = "tarflow",
        annealed: bool = False,
        attention_temperature: float = 1.0,
        denoise: float | None = None,
        denoise_batch_size: int | None = None,
        certify: bool = False,
    ) -> FlowPipelineOutput | tuple[list, SampleReport]:
        """Draw images.

        Args:
            class_labels: one class or several: integers of any kind, -1 for no class. None draws without a condition.
            height: height in pixels, by default the one of training.
            width: width in pixels, by default the one of training.
            aspect_ratio: shape at the area of training such as "3:2", in place of height and width.
            guidance_scale: guidance weight >= 0; 0 samples without guidance. A model without classes is guided by an
                attention_temperature other than 1.
            num_images_per_prompt: images per class, next to each other in the result.
            generator: one generator, or one per image, which makes each image independent of the others.
            latents: (N, C, H, W) noise to start from in place of random numbers.
            output_type: "pil", "np" or "pt" on [0, 1], or "latent" for the output of the flow on [-1, 1].
            return_dict: false returns (images, report).
            callback_on_step_end: called as callback(pipe, step, block, {"latents": x}) after each flow block; may
                return a mapping with other latents, and may set pipe._interrupt = True to skip the rest of the blocks.
            callback_on_step_end_tensor_inputs: names of the tensors that the callback takes; there are latents alone.
            progress: called as progress(done, total) with tokens of all blocks.
            method: "auto", "sequential" or "jacobi", see `Inversion`.
            window: tokens that "jacobi" iterates together; None for all.
            tol: tolerance of the parallel solvers.
            quantize: "int8" or "fp8" rounds weights to one byte per value, "bfloat16" weights and inputs of products to
                two; "none" does not.
            guidance_rule: "tarflow", "starflow" or "itarflow".
            annealed: let the guidance weight grow over the tokens of a block.
            attention_temperature: attention temperature of the branch without a class.
            denoise: factor of the score step, 0 for none; the pipeline's own by default.
            denoise_batch_size: images per backward pass; by default as many as fit into 4 GiB.
            certify: map the samples back to noise and report the largest difference.

        Raises:
            ConfigError: an argument is out of range; the message names it.
        """
        self._interrupt = False
        copies, denoise_rows = check_call(output_type, num_images_per_prompt, denoise_batch_size)
        step_end = as_step_end(callback_on_step_end, callback_on_step_end_tensor_inputs)
        options = SampleOptions(
            Guidance(guidance_scale, guidance_rule, annealed, attention_temperature),
            Inversion(method, window, tol, quantize),
            self.denoise_factor(denoise),
            certify,
        )
        labels = self._labels(class_labels, copies)
        count = copies if labels is None else len(labels)
        z = self.noise(count, self.size(height, width, aspect_ratio), generator, latents)
        recorder = Recorder(self._execution_device)
        return self._call(
            z, Condition(labels), options, recorder, output_type, denoise_rows, progress, step_end, return_dict,
        )  # fmt: skip

    def job_condition(self, jobs: list[Job], guidance: Guidance, recorder: Recorder) -> Condition:
        """Classes of a batch of jobs; a model with classes takes -1 for no class."""
        if not self.transformer.config.num_classes:
            return Condition()
        return Condition(self._labels([-1 if job.condition is None else job.condition for job in jobs], 1))

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, C, H, W) on [0, 1], rounded to the gray levels of training."""
        config = self.transformer.config
        return to_pixels(x, config.levels, config.noise_std) / 255

    def _labels(self, labels: Labels | int | None, copies: int) -> torch.Tensor | None:
        if labels is None:
            return None
        found, classes = integers(labels), self.transformer.config.num_classes
        if found is None or found.ndim > 1 or not found.numel() or found.min() < -1 or found.max() >= classes:
            expected = f"classes of -1 (none) to {classes - 1}" if classes else "None: the model has no classes"
            raise ConfigError(f"class_labels={labels!r}: expected {expected}")
        return found.reshape(-1).to(self._execution_device).repeat_interleave(copies)
