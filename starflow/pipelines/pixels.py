"""Class-conditional and unconditional images by a flow in pixels."""

from __future__ import annotations

from collections.abc import Callable

import torch

from starflow_kernels.spec import GuidanceRule, Quantize

from ..data.datasets import to_pixels
from ..errors import ConfigError
from ..inversion.solvers import Inversion
from ..models.flow import Guidance
from .base import Clock, FlowPipeline, FlowPipelineOutput, Options, PipelineReport, as_output
from .model import FlowModel


class TarFlowPipeline(FlowPipeline):
    """Images of a TarFlow (arXiv 2412.06329), with classes or without.

    transformer: the flow. denoise: factor of the score step that calls use by default; a model that was trained on
    uniformly dequantised data has none.
    """

    model_cpu_offload_seq = "transformer"

    def __init__(self, transformer: FlowModel, denoise: float = 1.0):
        super().__init__()
        self.register_modules(transformer=transformer)
        self.register_to_config(denoise=denoise)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | list[int] | None = None,
        height: int | None = None,
        width: int | None = None,
        aspect_ratio: str | None = None,
        guidance_scale: float = 0.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[FlowPipeline, int, int, dict], dict | None] | None = None,
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
    ) -> FlowPipelineOutput | tuple[list, PipelineReport]:
        """Draw images.

        Args:
            class_labels: a class or a list of them, -1 for none; None draws without a condition.
            num_images_per_prompt: images of each class.
            guidance_scale: weight w >= 0; 0 is sampling without guidance. A model without classes is guided against an
                attention_temperature other than 1.
            Everything else as in `STARFlowPipeline`; the unit of "latent" output is [-1, 1] for the pixels.

        Raises:
            ConfigError, ValueError: an argument out of range, by its name.
        """
        options = Options(
            num_images_per_prompt,
            output_type,
            Guidance(guidance_scale, guidance_rule, annealed, attention_temperature),
            Inversion(method, window, tol, quantize),
            denoise,
            denoise_batch_size,
            certify,
            progress,
            callback_on_step_end,
        )
        labels = self._labels(class_labels, num_images_per_prompt)
        count = num_images_per_prompt if labels is None else len(labels)
        size = self.size(height, width, aspect_ratio)
        clock = Clock(self._execution_device)
        z = self.noise(count, size, generator, latents)
        x, report = self.draw(z, labels, None, None, options, clock)
        if output_type == "latent":
            images = x
        else:
            with clock("decode"):
                config = self.transformer.config
                images = as_output(to_pixels(x, config.levels, config.noise_std) / 255, output_type)
        self.maybe_free_model_hooks()
        return FlowPipelineOutput(images, report) if return_dict else (images, report)

    def _labels(self, labels: int | list[int] | None, copies: int) -> torch.Tensor | None:
        if labels is None:
            return None
        labels = [labels] if isinstance(labels, int) else labels
        classes = self.transformer.config.num_classes
        if not isinstance(labels, (list, tuple)) or not all(isinstance(n, int) and -1 <= n < classes for n in labels):
            expected = f"classes of -1 (none) to {classes - 1}" if classes else "None: the model has no classes"
            raise ConfigError(f"class_labels={labels!r}: expected {expected}")
        return torch.tensor(labels, device=self._execution_device).repeat_interleave(copies)
