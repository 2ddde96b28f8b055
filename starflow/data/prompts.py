"""Prompts of a text-to-image flow: their states, and the aspect ratios that they may name."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import torch

from ..errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, T5EncoderModel

# width:height; a model that was trained on several of them is told which in the prompt.
ASPECT_RATIOS = ("1:1", "2:3", "3:2", "16:9", "9:16", "4:5", "5:4", "21:9", "9:21")


@torch.no_grad()
def encode_prompts(
    prompts: list[str], tokenizer: PreTrainedTokenizerBase, text_encoder: T5EncoderModel, length: int
) -> torch.Tensor:
    """float32 (N, length, text_dim) states of prompts: padded to `length` tokens, zero at the padding.

    A prompt of more tokens is cut, with a warning. On the device of the text encoder. Raises ConfigError for anything
    but a list of at least one string.
    """
    if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ConfigError(f"prompts={prompts!r}: expected a list of at least one string")
    different = list(dict.fromkeys(prompts))
    for prompt, ids in zip(different, tokenizer(different, verbose=False)["input_ids"]):
        if len(ids) > length:
            warnings.warn(f"a prompt of {len(ids)} tokens is cut to {length}: {prompt!r}", stacklevel=2)
    tokens = tokenizer(different, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    ids, mask = (tokens[name].to(text_encoder.device) for name in ("input_ids", "attention_mask"))
    # One at a time: the bits of a prompt's states then do not depend on its neighbours.
    rows = zip(ids.split(1), mask.split(1))
    states = torch.cat([text_encoder(input_ids=i, attention_mask=m).last_hidden_state.float() for i, m in rows])
    states = states * mask.to(states.device).unsqueeze(-1)
    return states[[different.index(prompt) for prompt in prompts]]


def with_aspect_ratio(prompt: str, ratio: str) -> str:
    """The prompt as a model of several aspect ratios was trained with it; ratio as "3:2", width first."""
    parse_ratio(ratio)
    return f"{prompt}\n in a {ratio} aspect ratio.\n"


def parse_ratio(ratio: str) -> float:
    """width / height of "width:height"."""
    parts = ratio.split(":") if isinstance(ratio, str) else []
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise ConfigError(f"aspect ratio {ratio!r}: expected WIDTH:HEIGHT such as {', '.join(ASPECT_RATIOS[:4])}")
    return int(parts[0]) / int(parts[1])


def image_size(ratio: str, side: int, multiple: int) -> tuple[int, int]:
    """(height, width) in pixels at an area of about side^2, each the nearest multiple of `multiple`, at least one."""
    value = parse_ratio(ratio)
    sides = side / math.sqrt(value), side * math.sqrt(value)
    return tuple(max(1, round(length / multiple)) * multiple for length in sides)


def nearest_ratio(height: int, width: int) -> str:
    """The one of ASPECT_RATIOS that is nearest to width:height, in the logarithm."""
    return min(ASPECT_RATIOS, key=lambda ratio: abs(math.log(parse_ratio(ratio) * height / width)))
