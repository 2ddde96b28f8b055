"""The tokenizer of a small text encoder, and paraphrases of the names of emoji."""

import pytest

pytest.importorskip("transformers")
from transformers import AutoTokenizer

from starflow import ConfigError
from starflow.data.datasets import DataConfig
from starflow.data.emoji import aliases, catalogue
from starflow.data.paraphrases import TONE, paraphrase
from starflow.data.vocabulary import UNKNOWN, TextConfig, make_tokenizer
from starflow.seeds import generator

TEXTS = ["Red heart", "cookie", "cherry", "horse", "box", "knife", "houses", "piñata", "o’clock", "cat face with tears"]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(TEXTS)


@pytest.fixture(scope="module")
def emoji():
    pytest.importorskip("emoji")
    return catalogue()


def words(tokenizer, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


@pytest.mark.parametrize("text", ["red heart", "RED  HEART!", "a red heart", "an emoji of the red heart", "réd-heart"])
def test_case_accents_punctuation_and_fillers_do_not_matter(tokenizer, text):
    assert words(tokenizer, text) == ["red", "heart", "</s>"]


@pytest.mark.parametrize(
    ("one", "many"),
    [
        ("heart", "hearts"), ("cookie", "cookies"), ("cherry", "cherries"), ("horse", "horses"), ("box", "boxes"),
        ("knife", "knives"), ("house", "houses"), ("face", "faces"),
    ],
)  # fmt: skip
def test_a_plural_is_its_singular_and_an_ending(tokenizer, one, many):
    singular = words(tokenizer, one)
    assert words(tokenizer, many) == [*singular[:-1], "s", "</s>"] and UNKNOWN not in singular


def test_other_words_are_unknown(tokenizer):
    assert words(tokenizer, "red dragon") == ["red", UNKNOWN, "</s>"]


def test_no_two_emoji_have_the_same_tokens(emoji):
    names = [one.name for one in emoji]
    tokens = {tuple(ids) for ids in make_tokenizer(names)(names)["input_ids"]}
    assert len(tokens) == len(names)


def test_a_saved_tokenizer_gives_the_same_tokens(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    expected = ["heart", "s", UNKNOWN, "cherri", "s", "</s>"]
    assert words(AutoTokenizer.from_pretrained(tmp_path), "Hearts & new cherries") == expected


def test_a_paraphrase_depends_on_its_random_numbers_alone(emoji):
    one = emoji[1000]
    first, again, other = (paraphrase(one, aliases(one), generator(seed)) for seed in (0, 0, 1))
    assert first == again != other


def test_paraphrases_keep_the_skin_tone(emoji):
    for one in emoji[::7]:
        if tones := TONE.findall(one.name):
            text = paraphrase(one, aliases(one), generator(0))
            assert all(tone in text for tone in tones) and "skin" in text


def test_paraphrases_of_a_heart(emoji):
    (heart,) = (one for one in emoji if one.name == "red heart")
    found = {paraphrase(heart, aliases(heart), generator(seed)) for seed in range(200)}
    assert found == {"red heart", "heart red", "red hearts", "hearts red", "heart", "hearts"}


@pytest.mark.parametrize("changes", [{"paraphrases": -1}, {"paraphrases": 2, "language": "de"}])
def test_wrong_paraphrases_are_refused(changes):
    with pytest.raises(ConfigError, match="paraphrases"):
        DataConfig(source="emoji", size=64, **changes)


@pytest.mark.parametrize("changes", [{"width": 20}, {"layers": -1}, {"length": 0}, {"init_scale": 0.0}])
def test_wrong_text_encoders_are_refused(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        TextConfig(**changes)
