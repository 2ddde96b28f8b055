"""Small text encoders for the words of a data set."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from ..errors import ConfigError
from ..settings import check_types

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, T5EncoderModel

HEAD_DIM = 16
UNKNOWN = "<unk>"
# Token of the ending of the plural.
PLURAL = "s"
# Words that change nothing in a prompt.
FILLERS = r"\b(?:a|an|the|of|please|draw|show|me|emoji|icon|image|picture)\b"
# The ending of the plural becomes a word, and singular and plural get the same stem ("cherry", "cherries": "cherri").
STEMS = (
    (r"(?<=s|x|z|o|ch|sh)es\b", f" {PLURAL}"),
    (r"(?<=s|x|z|o|ch|sh)e\b", ""),
    (r"(?<=[^s\s])s\b", f" {PLURAL}"),
    (r"(?:ve|fe)\b", "f"),
    (r"(?<=\w\w)(?:ie|y)\b", "i"),
)


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Shape of a small T5 encoder (arXiv 1910.10683) with random weights.

    Args:
        width: width of the states.
        layers: number of layers; 0 gives the states of the words alone.
        length: number of tokens to which a prompt is padded or cut.
        init_scale: scale of the random weights.
        seed: seed of the random weights.
    """

    width: int = 64
    layers: int = 2
    length: int = 16
    init_scale: float = 1.0
    seed: int = 0

    def __post_init__(self):
        check_types(self)
        if self.width < 1 or self.width % HEAD_DIM or self.layers < 0 or self.length < 1:
            raise ConfigError(
                f"width={self.width}, layers={self.layers}, length={self.length}: expected a multiple of "
                f"{HEAD_DIM} and positive integers"
            )
        if not 0 < self.init_scale < float("inf"):
            raise ConfigError(f"init_scale={self.init_scale}: expected a positive number")

    def build(self, vocabulary: int) -> T5EncoderModel:
        """Return a T5EncoderModel in eval mode.

        Args:
            vocabulary: number of tokens.
        """
        from transformers import T5Config, T5EncoderModel

        torch.manual_seed(self.seed)
        return T5EncoderModel(
            T5Config(
                vocab_size=vocabulary,
                d_model=self.width,
                d_kv=HEAD_DIM,
                num_heads=self.width // HEAD_DIM,
                d_ff=2 * self.width,
                num_layers=self.layers,
                dropout_rate=0.0,
                initializer_factor=self.init_scale,
            )
        ).eval()


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word and plural, whatever case and accents, and an end token.

    Words outside the texts have the token UNKNOWN. Punctuation and FILLERS have none.

    Args:
        texts: texts with all words.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    replacements = ((r"[^\w\s#*+]|_", " "), (FILLERS, " "), *STEMS)
    normalizer = normalizers.Sequence(
        [
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            *(normalizers.Replace(Regex(pattern), content) for pattern, content in replacements),
        ]
    )
    split = pre_tokenizers.WhitespaceSplit()
    words = {word for text in texts for word, _ in split.pre_tokenize_str(normalizer.normalize_str(text))}
    names = ["<pad>", "</s>", UNKNOWN, *sorted(words | {PLURAL})]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token=UNKNOWN)
