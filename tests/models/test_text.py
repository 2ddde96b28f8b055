"""Text states and aspect ratios."""

import math
import warnings

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from support.components import TEXT_DIM, TEXT_LEN, text_encoder, tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from starflow import ConfigError
from starflow.data.prompts import (
    ASPECT_RATIOS,
    encode_prompts,
    image_size,
    nearest_ratio,
    warn_of_unknown_words,
    with_aspect_ratio,
)
from starflow.data.vocabulary import TextConfig, make_tokenizer

PROMPTS = ["a red cat", "", "the small dog and a piano", "a red cat"]


@pytest.fixture(scope="module")
def parts():
    return tokenizer(), text_encoder()


@pytest.fixture(scope="module")
def words():
    known = make_tokenizer(["red", "blue", "heart"])
    return known, TextConfig(width=TEXT_DIM).build(len(known))


def test_states_are_those_of_the_prompt_alone_and_zero_at_the_padding(parts):
    states = encode_prompts(PROMPTS, *parts, TEXT_LEN)
    assert states.shape == (4, TEXT_LEN, TEXT_DIM) and states.dtype == torch.float32
    for prompt, found in zip(PROMPTS, states):
        ids = parts[0](prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            alone = parts[1](ids).last_hidden_state[0]
        torch.testing.assert_close(found[: len(alone)], alone, atol=1e-6, rtol=1e-5)
        assert not found[len(alone) :].any() and found[: len(alone)].any(dim=1).all()
    assert torch.equal(states[0], states[3])


def test_a_long_prompt_is_cut_with_a_warning(parts):
    with pytest.warns(UserWarning, match="of 21 tokens is cut to 12"):
        states = encode_prompts(["cat " * 20, "cat"], *parts, TEXT_LEN)
    assert states[0].any(dim=1).all()


def unknown(prompts: list[str], tokenizer) -> list[str]:
    """Return the warnings of prompts, each with the words that it names."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_unknown_words(prompts, tokenizer)
    return [str(each.message).removeprefix("the text encoder does not know ") for each in caught]


def test_unknown_words_of_all_prompts_are_named_in_one_warning(words, monkeypatch):
    monkeypatch.setattr("starflow.data.prompts.ENCODED_PROMPTS", 1)
    assert unknown(["Red cars", "a  Café, blue hearts", "red cars"], words[0]) == ["'cars', 'Café'"]
    assert unknown(["blue Heart", ""], words[0]) == []


def test_unknown_words_are_left_out(words):
    of_known, empty = (encode_prompts([text], *words, TEXT_LEN) for text in ("red", ""))
    assert torch.equal(encode_prompts(["grün red"], *words, TEXT_LEN), of_known)
    assert torch.equal(encode_prompts(["grün"], *words, TEXT_LEN), empty)


def test_many_unknown_words_are_counted(words):
    names = [f"w{i}" for i in range(11)]
    assert unknown([" ".join(names)], words[0]) == [", ".join(map(repr, names[:10])) + " and 1 more"]


def test_the_word_around_an_unknown_letter_is_named(parts):
    assert unknown(["a café 猫"], parts[0]) == ["'café', '猫'"]


def test_a_tokenizer_with_bytes_knows_every_word():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), *((f"<0x{i:02X}>", -9.0) for i in range(256))]
    backend = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    spelled = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    assert len(spelled("é猫")["input_ids"]) > 4
    assert unknown(["猫"], spelled) == []


def test_a_narrow_encoder_gives_float32(parts):
    states = encode_prompts(PROMPTS, parts[0], text_encoder().bfloat16(), TEXT_LEN)
    assert states.dtype == torch.float32
    torch.testing.assert_close(states, encode_prompts(PROMPTS, *parts, TEXT_LEN), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("prompts", ["a cat", [], [1], None])
def test_prompts_are_checked(parts, prompts):
    with pytest.raises(ConfigError, match="list of at least one string"):
        encode_prompts(prompts, *parts, TEXT_LEN)


def test_sizes_of_the_aspect_ratios():
    found = {ratio: image_size(ratio, 256, 8) for ratio in ASPECT_RATIOS}
    assert found["1:1"] == (256, 256) and found["3:2"] == (208, 312) and found["9:16"] == (344, 192)
    for ratio, (height, width) in found.items():
        w, h = map(int, ratio.split(":"))
        assert abs(height - 256 * math.sqrt(h / w)) <= 4 and abs(width - 256 * math.sqrt(w / h)) <= 4
        assert nearest_ratio(height, width) == ratio
    assert image_size("21:1", 8, 8) == (8, 40)


def test_the_prompt_names_its_ratio():
    assert with_aspect_ratio("a cat", "3:2") == "a cat\n in a 3:2 aspect ratio.\n"
    for wrong in ("3", "3:0", "a:b", "3:2:1", None):
        with pytest.raises(ConfigError, match="WIDTH:HEIGHT"):
            with_aspect_ratio("a cat", wrong)
