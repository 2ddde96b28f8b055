"""Prompts of a text-to-image flow: their text states and aspect ratios."""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CheckpointError, ConfigError
from ..io.files import permit_reading, write_folder
from ..io.tensors import copy_weights
from ..models.hooks import execution_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, T5EncoderModel

# width:height. A model that was trained on several ratios reads the ratio from the prompt.
ASPECT_RATIOS = ("1:1", "2:3", "3:2", "16:9", "9:16", "4:5", "5:4", "21:9", "9:21")

# Start of a prompt in a warning.
SHOWN_CHARACTERS = 80
# Unknown words in a warning.
SHOWN_WORDS = 10
# Prompts that are searched for unknown words at once.
ENCODED_PROMPTS = 1000


def load_text(folder: str | Path, device: str | torch.device = "cpu") -> tuple[Any, Any]:
    """Return the tokenizer and the T5EncoderModel of a folder.

    Args:
        folder: folder with tokenizer/ and text_encoder/.
        device: torch device of the encoder.

    Raises:
        CheckpointError: a part is missing or damaged.
        ConfigError: the package transformers is missing.
    """
    folder = Path(folder)
    try:
        from transformers import AutoTokenizer, T5EncoderModel
    except ImportError:
        raise ConfigError("captions need transformers: pip install 'starflow-kernels[models]'") from None
    for name in ("tokenizer", "text_encoder"):
        if not (folder / name).is_dir():
            raise CheckpointError(f"no text encoder at {folder}: {folder / name} is not there")
    try:
        # transformers refuses the meta device as the default.
        with torch.device("cpu"):
            tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
            text_encoder = T5EncoderModel.from_pretrained(folder / "text_encoder", local_files_only=True)
    except Exception as error:
        # transformers raises many types of errors.
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{folder}: not a text encoder that transformers reads ({reason})") from None
    copy_weights(text_encoder)
    return tokenizer, text_encoder.to(device).eval()


def save_text(tokenizer: PreTrainedTokenizerBase, text_encoder: T5EncoderModel, folder: Path) -> None:
    """Write what `load_text` reads; each of the two folders is written whole or not at all.

    Args:
        tokenizer: tokenizer of the text encoder.
        text_encoder: T5 encoder.
        folder: folder to write.

    Raises:
        StarflowError: the file system refuses.
    """
    for name, part in (("tokenizer", tokenizer), ("text_encoder", text_encoder)):
        with write_folder(Path(folder) / name, overwrite=True) as temporary:
            part.save_pretrained(temporary)
            permit_reading(temporary)


@torch.no_grad()
def encode_prompts(
    prompts: list[str], tokenizer: PreTrainedTokenizerBase, text_encoder: T5EncoderModel, length: int
) -> torch.Tensor:
    """Return float32 (N, length, text_dim) text states on the device of the text encoder, zero at the padding.

    A warning names a prompt of more than `length` tokens, which is cut.

    Args:
        prompts: at least one prompt.
        tokenizer: tokenizer of the text encoder.
        text_encoder: T5 encoder.
        length: number of tokens to which a prompt is padded.

    Raises:
        ConfigError: `prompts` is not a list of at least one string.
    """
    if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ConfigError(f"prompts={prompts!r}: expected a list of at least one string")
    different = list(dict.fromkeys(prompts))
    for prompt, ids in zip(different, tokenizer(different, verbose=False)["input_ids"]):
        if len(ids) > length:
            warnings.warn(
                f"a prompt of {len(ids)} tokens is cut to {length}: {prompt!r:.{SHOWN_CHARACTERS}}", stacklevel=2
            )
    tokens = tokenize(different, tokenizer, length).to(execution_device(text_encoder))
    # One prompt at a time, so that its bits do not depend on the other prompts.
    states = torch.cat([text_states(row, tokenizer, text_encoder) for row in tokens.split(1)])
    return states[[different.index(prompt) for prompt in prompts]]


def tokenize(prompts: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> torch.Tensor:
    """Return int64 (N, length) tokens, padded or cut to the length.

    A tokenizer with a token per word leaves unknown words out: its text encoder has never seen their token.

    Args:
        prompts: at least one prompt.
        tokenizer: tokenizer of the text encoder.
        length: number of tokens.
    """
    if tokenizer.is_fast and type(tokenizer.backend_tokenizer.model).__name__ == "WordLevel":
        prompts = [without_unknown_words(prompt, tokenizer) for prompt in prompts]
    with torch.device("cpu"):
        options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
        return tokenizer(prompts, **options)["input_ids"]


def text_states(tokens: torch.Tensor, tokenizer: PreTrainedTokenizerBase, text_encoder: T5EncoderModel) -> torch.Tensor:
    """Return float32 (N, length, text_dim) text states, zero at the padding, with gradients if they are enabled.

    Args:
        tokens: (N, length) tokens.
        tokenizer: tokenizer of the text encoder.
        text_encoder: T5 encoder.
    """
    mask = tokens != tokenizer.pad_token_id
    states = text_encoder(input_ids=tokens, attention_mask=mask).last_hidden_state.float()
    return states * mask.to(states.device).unsqueeze(-1)


def _unknown(prompt: str, encoding: Any, unknown: int) -> list[slice]:
    """Return the places of unknown words in a prompt, with endings that are tokens of their own."""
    places = []
    for token, word in zip(encoding.ids, encoding.word_ids):
        if token == unknown and word is not None:
            start, stop = encoding.word_to_chars(word)
            places.append(slice(start, stop + len(re.match(r"\w*", prompt[stop:])[0])))
    return places


def without_unknown_words(prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a prompt with spaces in place of the words that a fast tokenizer does not know."""
    for place in _unknown(prompt, tokenizer([prompt], verbose=False).encodings[0], tokenizer.unk_token_id):
        prompt = prompt[: place.start] + " " * (place.stop - place.start) + prompt[place.stop :]
    return prompt


def unknown_words(prompts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the words of prompts that a tokenizer does not know, and prompts without any word for it, each once.

    Args:
        prompts: the prompts.
        tokenizer: the tokenizer. One that knows all words, or no positions of tokens, gives none.
    """
    unknown = tokenizer.unk_token_id
    if unknown is None or not tokenizer.is_fast:
        return []
    found: dict[str, None] = {}
    # Encodings of a million prompts would take gigabytes.
    for first in range(0, len(prompts), ENCODED_PROMPTS):
        part = prompts[first : first + ENCODED_PROMPTS]
        for prompt, encoding in zip(part, tokenizer(part, verbose=False).encodings):
            found |= {prompt[place]: None for place in _unknown(prompt, encoding, unknown)}
            if prompt.strip() and all(word is None for word in encoding.word_ids):
                found[prompt.strip()] = None
    return list(found)


def warn_of_unknown_words(prompts: list[str], tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Name the words of prompts that a tokenizer does not know, in one warning.

    Args:
        prompts: the prompts.
        tokenizer: the tokenizer; None if there are no prompts.
    """
    if prompts and (words := unknown_words(prompts, tokenizer)):
        more = f" and {len(words) - SHOWN_WORDS} more" if len(words) > SHOWN_WORDS else ""
        shown = ", ".join(map(repr, words[:SHOWN_WORDS]))
        warnings.warn(f"the text encoder does not know {shown}{more}", stacklevel=2)


def with_aspect_ratio(prompt: str, ratio: str) -> str:
    """Return the prompt with its aspect ratio, in the form that models of several aspect ratios were trained on.

    Args:
        prompt: text of the prompt.
        ratio: aspect ratio such as "3:2", width first.
    """
    parse_ratio(ratio)
    return f"{prompt}\n in a {ratio} aspect ratio.\n"


def parse_ratio(ratio: str) -> float:
    """Return width / height.

    Args:
        ratio: text such as "3:2", width first.

    Raises:
        ConfigError: the text is no ratio.
    """
    found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", ratio) if isinstance(ratio, str) else None
    if not found or not all(map(int, found.groups())):
        raise ConfigError(f"aspect ratio {ratio!r}: expected WIDTH:HEIGHT such as {', '.join(ASPECT_RATIOS[:4])}")
    return int(found[1]) / int(found[2])


def image_size(ratio: str, side: int, multiple: int) -> tuple[int, int]:
    """Return (height, width) in pixels, with an area of about side^2.

    Args:
        ratio: aspect ratio such as "3:2", width first.
        side: side in pixels of a square of that area.
        multiple: divisor of height and width.
    """
    value = parse_ratio(ratio)
    sides = side / math.sqrt(value), side * math.sqrt(value)
    return tuple(max(1, round(length / multiple)) * multiple for length in sides)


def nearest_ratio(height: int, width: int) -> str:
    """Return the aspect ratio of ASPECT_RATIOS that is nearest to width / height on a logarithmic scale.

    Args:
        height: height in pixels.
        width: width in pixels.
    """
    return min(ASPECT_RATIOS, key=lambda ratio: abs(math.log(parse_ratio(ratio) * height / width)))
