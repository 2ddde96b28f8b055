"""Text to image by a flow on the latents of an autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from starflow_kernels.spec import GuidanceRule, Quantize

from ..data.prompts import encode_prompts, nearest_ratio, warn_of_unknown_words, with_aspect_ratio
from ..errors import ConfigError
from ..inversion.request import Inversion
from ..models.guidance import Guidance
from ..sampling.jobs import Job
from ..sampling.sample import Recorder, SampleOptions, SampleReport
from .base import Condition, FlowPipeline, FlowPipelineOutput, StepCallback, as_step_end, check_call
from .model import FlowModel


class STARFlowPipeline(FlowPipeline):
    """Images of a STARFlow (arXiv 2506.06276): prompt, text states, flow, score denoising, decoder.

    Args:
        transformer: the flow.
        vae: the autoencoder whose latents, times its scaling factor, the flow models.
        text_encoder: T5; without it calls need prompt_embeds.
        tokenizer: the tokenizer of T5.
        mixed_aspect: the flow was trained on several aspect ratios, and every prompt names its own.
        denoise: factor of the score step that calls use by default; 0 for an autoencoder whose decoder was trained on
            noisy latents.
        guidance: guidance weight that calls use by default.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["text_encoder", "tokenizer"]  # noqa: RUF012

    def __init__(
        self,
        transformer: FlowModel,
        vae: AutoencoderKL,
        text_encoder: T5EncoderModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        mixed_aspect: bool = False,
        denoise: float = 1.0,
        guidance: float = 3.6,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
        self.register_to_config(mixed_aspect=mixed_aspect, denoise=denoise, guidance=guidance)
        self.pixels_per_latent = 2 ** (len(vae.config.block_out_channels) - 1)

    @property
    def default_guidance(self) -> Guidance:
        """Guidance of a call that does not give any."""
        return Guidance(self.config.guidance, "starflow")

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        aspect_ratio: str | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
        progress: Callable[[int, int], None] | None = None,
        method: str = "auto",
        window: int | None = None,
        tol: float | None = None,
        quantize: Quantize = "none",
        guidance_rule: GuidanceRule = "starflow",
        annealed: bool = False,
        attention_temperature: float = 1.0,
        denoise: float | None = None,
        denoise_batch_size: int | None = None,
        certify: bool = False,
    ) -> FlowPipelineOutput | tuple[list, SampleReport]:
        """Draw images of prompts.

        Args:
            prompt: one prompt, or several in a list, tuple or array.
            height: height in pixels, by default the one of training. Another size scales the rotary positions.
            width: width in pixels, by default the one of training.
            aspect_ratio: shape at the area of training such as "3:2", in place of height and width.
            guidance_scale: guidance weight >= 0, the pipeline's own by default; 0 samples without guidance. A scale
                that counts from 1 is this weight plus 1. It acts on the blocks that the text reaches.
            negative_prompt: prompt that guidance moves away from, or one per prompt; "" by default.
            num_images_per_prompt: images per prompt, next to each other in the result.
            generator: one generator, or one per image, which makes each image independent of the others.
            latents: (N, C, h, w) noise to start from in place of random numbers.
            prompt_embeds: (N, text_len, text_dim) states from `encode_prompts`, in place of prompts.
            negative_prompt_embeds: (1 or N, text_len, text_dim) states, in place of negative prompts.
            output_type: "pil", "np" or "pt" on [0, 1], or "latent" for the output of the flow.
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
            guidance_rule: "starflow", "tarflow" or "itarflow".
            annealed: let the guidance weight grow over the tokens of a block.
            attention_temperature: attention temperature of the branch without the prompt.
            denoise: factor of the score step, 0 for none; the pipeline's own by default.
            denoise_batch_size: images per backward pass; by default as many as fit into 4 GiB.
            certify: map the samples back to noise and report the largest difference.

        Raises:
            ConfigError: an argument is out of range; the message names it.
        """
        self._interrupt = False
        copies, denoise_rows = check_call(output_type, num_images_per_prompt, denoise_batch_size)
        step_end = as_step_end(callback_on_step_end, callback_on_step_end_tensor_inputs)
        weight = self.default_guidance.weight if guidance_scale is None else guidance_scale
        options = SampleOptions(
            Guidance(weight, guidance_rule, annealed, attention_temperature),
            Inversion(method, window, tol, quantize),
            self.denoise_factor(denoise),
            certify,
        )
        size = self.size(height, width, aspect_ratio)
        ratio = aspect_ratio or nearest_ratio(*size)
        recorder = Recorder(self._execution_device)
        condition = self._condition(
            prompt, prompt_embeds, negative_prompt, negative_prompt_embeds, ratio, copies,
            options.guidance, recorder,
        )  # fmt: skip
        texts = [*_listed(prompt), *(_listed(negative_prompt) if options.guidance.weight else ())]
        warn_of_unknown_words(texts, self.tokenizer)
        z = self.noise(len(condition.text), size, generator, latents)
        return self._call(
            z, condition, options, recorder, output_type, denoise_rows, progress, step_end, return_dict,
        )  # fmt: skip

    def job_condition(
        self,
        jobs: list[Job],
        guidance: Guidance,
        recorder: Recorder,
        ratio: str = "1:1",
        negative_prompt: str | None = None,
    ) -> Condition:
        """Text states of the prompts of a batch of jobs.

        Args:
            jobs: the jobs.
            guidance: guidance of the batch.
            recorder: takes the time.
            ratio: aspect ratio of the images.
            negative_prompt: prompt that guidance moves away from; "" by default.
        """
        prompts = [job.condition for job in jobs]
        return self._condition(prompts, None, negative_prompt, None, ratio, 1, guidance, recorder)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, C, H, W) on [0, 1] of latents."""
        config = self.vae.config
        latents = x / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        return (self.vae.decode(latents.to(self.vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)

    def _condition(
        self,
        prompt: str | list[str] | None,
        embeds: torch.Tensor | None,
        negative_prompt: str | list[str] | None,
        negative_embeds: torch.Tensor | None,
        ratio: str,
        copies: int,
        guidance: Guidance,
        recorder: Recorder,
    ) -> Condition:
        """Condition with `copies` rows per prompt; only guidance computes states to move away from."""
        with recorder.clock("text"):
            text, empty = self._states("prompt", prompt, embeds, ratio), None
            if guidance.weight:
                negative_prompt = "" if negative_prompt is None and negative_embeds is None else negative_prompt
                empty = self._states("negative_prompt", negative_prompt, negative_embeds, ratio)
                if len(empty) not in (1, len(text)):
                    raise ConfigError(f"negative_prompt: {len(empty)} of them for {len(text)} prompts")
                empty = empty.expand_as(text).repeat_interleave(copies, dim=0)
            return Condition(None, text.repeat_interleave(copies, dim=0), empty)

    def _states(
        self, name: str, prompts: str | list[str] | None, states: torch.Tensor | None, ratio: str
    ) -> torch.Tensor:
        """States (N, text_len, text_dim) of prompts, or the given states."""
        config = self.transformer.config
        if (prompts is None) == (states is None):
            raise ConfigError(f"{name}: give it or {name}_embeds, one of them")
        if states is not None:
            expected = (config.text_len, config.text_dim)
            if not isinstance(states, torch.Tensor) or states.shape[1:] != expected or not len(states):
                raise ConfigError(f"{name}_embeds: expected (N, {expected[0]}, {expected[1]}), N at least 1")
            return states.to(self._execution_device, torch.float32)
        if self.text_encoder is None or self.tokenizer is None:
            raise ConfigError(f"{name}: the pipeline has no text encoder, give {name}_embeds")
        prompts = _listed(prompts)
        if self.config.mixed_aspect and isinstance(prompts, list):
            prompts = [with_aspect_ratio(prompt, ratio) if isinstance(prompt, str) else prompt for prompt in prompts]
        return encode_prompts(prompts, self.tokenizer, self.text_encoder, config.text_len).to(self._execution_device)


def _listed(prompts: str | Sequence[str] | np.ndarray | None) -> list[str]:
    """Return prompts in a list, an empty one for None. What is no prompt stays as it is."""
    if prompts is None:
        return []
    prompts = prompts.tolist() if isinstance(prompts, np.ndarray) else prompts
    return [prompts] if isinstance(prompts, str) else list(prompts) if isinstance(prompts, tuple) else prompts
