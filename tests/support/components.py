"""Real component classes of a text-to-image pipeline at small random sizes, made without any download."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

from starflow.data.vocabulary import TextConfig, make_tokenizer
from starflow.pipelines import FlowModel, STARFlowPipeline

SPOKEN = "a an the in of and aspect ratio. cat dog piano three seven red blue small large 1:1 2:3 3:2 16:9"
WORDS = SPOKEN.split()
TEXT_LEN, TEXT_DIM = 12, 16


def tokenizer() -> T5TokenizerFast:
    """Return T5's tokenizer with a vocabulary of words and letters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0) for word in WORDS] + [(letter, -5.0) for letter in string.ascii_lowercase]
    return T5TokenizerFast(vocab=pieces, extra_ids=0)


def text_encoder() -> T5EncoderModel:
    """Return T5 with the gated GELU and relative positions of flan-t5."""
    torch.manual_seed(1)
    config = T5Config(
        vocab_size=30 + len(WORDS), d_model=TEXT_DIM, d_kv=8, num_heads=2, d_ff=32, num_layers=2,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    return T5EncoderModel(config).eval()


def vae() -> AutoencoderKL:
    """Return an autoencoder like that of Stable Diffusion, 4 latent channels, but 2 pixels per latent."""
    torch.manual_seed(2)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=16,
        scaling_factor=0.18215,
    ).eval()  # fmt: skip


def flow_model(**changes) -> FlowModel:
    """Return STARFlow's architecture with random weights and small heads."""
    torch.manual_seed(3)
    fields = {
        "image_size": 8, "image_channels": 4, "patch_size": 1, "channels": 16, "layers": [1, 1, 2], "head_dim": 8,
        "last_channels": 32, "scale": "softplus", "soft_clip": 4.0, "start": True, "rotary": "interleaved",
        "patch_order": "hwc", "final_norm": True, "sequence_order": "L2R", "condition_blocks": "last",
        "text_dim": TEXT_DIM, "text_len": TEXT_LEN, "noise_std": 0.3,
    }  # fmt: skip
    model = FlowModel(**{**fields, **changes})
    for name, parameter in model.named_parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.04 if "proj_out" in name else 0.15)
    return model.eval()


def pipeline(**changes) -> STARFlowPipeline:
    """Return all components together, without a progress bar."""
    made = STARFlowPipeline(flow_model(), vae(), text_encoder(), tokenizer(), **changes)
    made.set_progress_bar_config(disable=True)
    return made


def save_bundled(folder: Path, words: str) -> Path:
    """Save a pipeline as the package holds it: float16 weights, and a tokenizer of these words alone."""
    words_only = make_tokenizer(words.split())
    encoder = TextConfig(width=TEXT_DIM).build(len(words_only))
    made = STARFlowPipeline(flow_model(), vae(), encoder, words_only, guidance=2.0)
    for part in (made.transformer, made.vae, made.text_encoder):
        part.half()
    made.save_pretrained(folder)
    return folder


def save(folder: Path, **options) -> Path:
    """Save all components in the layout of diffusers."""
    pipeline().save_pretrained(folder, **options)
    return folder
