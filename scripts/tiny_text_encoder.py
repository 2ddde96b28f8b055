"""Write a small frozen text encoder for a closed vocabulary: text_encoder/ and tokenizer/ in the layout of a pipeline.

    python scripts/tiny_text_encoder.py FOLDER --words zero one two

A T5 encoder with random weights: each word has its own random states, which are enough for a flow to learn what the
words of its captions mean. It knows nothing of language; words outside the vocabulary are all alike to it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel


def make_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """Words to numbers, an end token behind them."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *sorted({w.lower() for w in words})])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def make_text_encoder(vocabulary: int, width: int, seed: int) -> T5EncoderModel:
    """T5's encoder with random weights."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=vocabulary, d_model=width, d_kv=16, num_heads=max(1, width // 16), d_ff=2 * width, num_layers=2
    )
    return T5EncoderModel(config).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--words", nargs="+", required=True, help="the vocabulary")
    parser.add_argument("--width", type=int, default=64, help="of the states (default 64)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = make_tokenizer(args.words)
    tokenizer.save_pretrained(args.folder / "tokenizer")
    make_text_encoder(len(tokenizer), args.width, args.seed).save_pretrained(args.folder / "text_encoder")


if __name__ == "__main__":
    main()
