"""Write a small frozen text encoder for a closed vocabulary, as text_encoder/ and tokenizer/ of a pipeline.

    python scripts/tiny_text_encoder.py FOLDER --words zero one two

It is a T5 encoder with random weights. Each word has its own random states, from which a flow can learn what the words
mean. All words outside the vocabulary have the same states.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel


def make_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word and an end token.

    Args:
        words: vocabulary.
    """
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *sorted({w.lower() for w in words})])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def make_text_encoder(vocabulary: int, width: int, seed: int) -> T5EncoderModel:
    """Return a T5 encoder with random weights.

    Args:
        vocabulary: number of tokens.
        width: width of the states.
        seed: seed of the weights.
    """
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=vocabulary, d_model=width, d_kv=16, num_heads=max(1, width // 16), d_ff=2 * width, num_layers=2
    )
    return T5EncoderModel(config).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument("--words", nargs="+", required=True, help="the vocabulary")
    parser.add_argument("--width", type=int, default=64, help="width of the states (default 64)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default 0)")
    args = parser.parse_args()
    tokenizer = make_tokenizer(args.words)
    tokenizer.save_pretrained(args.folder / "tokenizer")
    make_text_encoder(len(tokenizer), args.width, args.seed).save_pretrained(args.folder / "text_encoder")


if __name__ == "__main__":
    main()
