"""Text to image by a flow in the latents of an autoencoder."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import AutoencoderKL
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from starflow_kernels.spec import GuidanceRule, Quantize

from ..data.prompts import encode_prompts, nearest_ratio, with_aspect_ratio
from ..errors import ConfigError
from ..inversion.solvers import Inversion
from ..models.flow import Guidance
from .base import Clock, FlowPipeline, FlowPipelineOutput, Options, PipelineReport, as_output
from .model import FlowModel


class STARFlowPipeline(FlowPipeline):
    """Images of a STARFlow (arXiv 2506.06276): prompt, text states, flow, score denoising, decoder.

    transformer: the flow. vae: the autoencoder whose latents, times its scaling factor, the flow models. text_encoder,
    tokenizer: T5 and its tokenizer; without them calls need prompt_embeds. mixed_aspect: the flow was trained on
    several aspect ratios and every prompt names its own. denoise: factor of the score step that calls use by default, 0
    for a vae whose decoder was trained on noisy latents.
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
    ):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
        self.register_to_config(mixed_aspect=mixed_aspect, denoise=denoise)
        self.pixels_a_latent = 2 ** (len(vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        aspect_ratio: str | None = None,
        guidance_scale: float = 3.6,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[FlowPipeline, int, int, dict], dict | None] | None = None,
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
    ) -> FlowPipelineOutput | tuple[list, PipelineReport]:
        """Draw images of prompts.

        Args:
            prompt: one or a list of them.
            height, width: in pixels; or aspect_ratio, "3:2" say: that shape at the area of training. By default the
                size of training. Other sizes than that scale the rotary positions.
            guidance_scale: weight w >= 0 of the released models; 0 is sampling without guidance (a scale that counts
                from 1 is w + 1). It acts on the blocks that the text reaches.
            negative_prompt: what guidance moves away from, one or a list of as many as prompts; "" by default.
            num_images_per_prompt: images of each prompt, next to each other in the result.
            generator: one, or one an image: the image then does not depend on its neighbours. On the CPU or a device.
            latents: (N, C, h, w) noise to start from in place of random numbers.
            prompt_embeds, negative_prompt_embeds: (N, text_len, text_dim) from `encode_prompts` in place of prompts.
            output_type: "pil", "np" or "pt" on [0, 1], or "latent" for what the flow made, times the scaling factor.
            return_dict: False returns (images, report).
            callback_on_step_end: called as callback(pipe, step, block, {"latents": x}) after every flow block; may
                return a mapping with other latents.
            progress: called as progress(done, total) with token steps.
            method, window, tol, quantize: how the flow is inverted, "auto", "sequential" or "jacobi", and from weights
                of one byte by "int8" or "fp8", see `starflow.solvers.Inversion`.
            guidance_rule: "starflow" or "tarflow". annealed: the weight grows over the tokens. attention_temperature:
                of the branch without the prompt.
            denoise: factor of the score step, 0 for none; the pipeline's own by default.
            denoise_batch_size: images in a backward pass; by default as many as fit a few GiB.
            certify: measure how exact the samples are, one parallel pass more.

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
        size = self.size(height, width, aspect_ratio)
        ratio = aspect_ratio or nearest_ratio(*size)
        clock = Clock(self._execution_device)
        with clock("text"):
            text = self._states("prompt", prompt, prompt_embeds, ratio)
            empty = None
            if guidance_scale:
                negative_prompt = "" if negative_prompt is None and negative_prompt_embeds is None else negative_prompt
                empty = self._states("negative_prompt", negative_prompt, negative_prompt_embeds, ratio)
                if len(empty) not in (1, len(text)):
                    raise ConfigError(f"negative_prompt: {len(empty)} of them for {len(text)} prompts")
                empty = empty.expand_as(text).repeat_interleave(num_images_per_prompt, dim=0)
            text = text.repeat_interleave(num_images_per_prompt, dim=0)
        z = self.noise(len(text), size, generator, latents)
        x, report = self.draw(z, None, text, empty, options, clock)
        if output_type == "latent":
            images = x
        else:
            with clock("decode"):
                images = as_output(self._decode(x), output_type)
        self.maybe_free_model_hooks()
        return FlowPipelineOutput(images, report) if return_dict else (images, report)

    def _states(
        self, name: str, prompts: str | list[str] | None, states: torch.Tensor | None, ratio: str
    ) -> torch.Tensor:
        """(N, text_len, text_dim) of the prompts or of the states, whichever is given."""
        config = self.transformer.config
        if (prompts is None) == (states is None):
            raise ConfigError(f"{name}: give it or {name}_embeds, one of them")
        if states is not None:
            expected = (config.text_len, config.text_dim)
            if not isinstance(states, torch.Tensor) or states.ndim != 3 or states.shape[1:] != expected:
                raise ConfigError(f"{name}_embeds: expected (N, {expected[0]}, {expected[1]})")
            return states.to(self._execution_device, torch.float32)
        if self.text_encoder is None or self.tokenizer is None:
            raise ConfigError(f"{name}: the pipeline has no text encoder, give {name}_embeds")
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if self.config.mixed_aspect and isinstance(prompts, list):
            prompts = [with_aspect_ratio(prompt, ratio) if isinstance(prompt, str) else prompt for prompt in prompts]
        return encode_prompts(prompts, self.tokenizer, self.text_encoder, config.text_len).to(self._execution_device)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images on [0, 1] of latents."""
        config = self.vae.config
        latents = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        return (self.vae.decode(latents.to(self.vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)
