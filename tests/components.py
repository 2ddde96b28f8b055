"""Real component classes of a text-to-image pipeline at small random sizes, made without any download."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

WORDS = [
    "a",
    "an",
    "the",
    "in",
    "of",
    "and",
    "aspect",
    "ratio",
    ".",
    "cat",
    "dog",
    "piano",
    "three",
    "seven",
    "red",
    "blue",
    "small",
    "large",
    "1",
    "2",
    "3",
    "4",
    "5",
    "9",
    "16",
    "21",
    ":",
]
TEXT_LEN, TEXT_DIM = 12, 16


def tokenizer() -> PreTrainedTokenizerFast:
    """Words to numbers; an end token is appended, as T5's tokenizer does."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def text_encoder() -> T5EncoderModel:
    """T5 as flan-t5 has it: gated GELU, relative positions."""
    torch.manual_seed(1)
    config = T5Config(
        vocab_size=3 + len(WORDS), d_model=TEXT_DIM, d_kv=8, num_heads=2, d_ff=32, num_layers=2,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    return T5EncoderModel(config).eval()


def vae() -> AutoencoderKL:
    """As the autoencoder of Stable Diffusion, 4 latent channels, but 2 pixels a latent."""
    torch.manual_seed(2)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=16,
        scaling_factor=0.18215,
    ).eval()  # fmt: skip
