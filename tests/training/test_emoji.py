"""Emoji: their parts, their split, and their images."""

import dataclasses
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import features
from support import emoji_font

from starflow import ConfigError, DataError
from starflow.data.datasets import DataConfig, data_state, load
from starflow.data.emoji import catalogue, find_font, may_flip, parts

NOTO = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
WHITE, NAVY = [255, 255, 255], [0, 0, 128]


@pytest.fixture(scope="module")
def emoji():
    pytest.importorskip("emoji")
    return {one.text: one for one in catalogue()}


@pytest.fixture(scope="module")
def font(tmp_path_factory):
    pytest.importorskip("emoji")
    pytest.importorskip("fontTools")
    if not features.check("raqm"):
        pytest.skip("Pillow without raqm does not join characters")
    return str(emoji_font.make(tmp_path_factory.mktemp("font") / "color.ttf"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("❤️", ("❤", "", "")),
        ("👍🏾", ("👍", "medium-dark", "")),
        ("👨🏿‍🚒", ("🧑‍🚒", "dark", "male")),
        ("🏃🏽‍♀️‍➡️", ("🏃‍➡", "medium", "female")),
        ("👩‍🦰", ("🧑‍🦰", "", "female")),
        ("🤶🏻", ("🧑‍🎄", "light", "female")),
        ("👫🏼", ("🧑‍🤝‍🧑", "medium-light", "female, male")),
        ("👩🏻‍🤝‍👨🏿", ("🧑‍🤝‍🧑", "light, dark", "female, male")),
        ("👬", ("🧑‍🤝‍🧑", "", "male")),
        ("🫱🏻‍🫲🏿", ("🫱‍🫲", "light, dark", "")),
        ("👯‍♀️", ("🧑‍🐰‍🧑", "", "female")),
        ("♂️", ("♂", "", "")),
        ("🏴‍☠️", ("🏴‍☠", "", "")),
    ],
)
def test_parts_of_an_emoji(text, expected):
    assert parts(text) == expected


def test_no_two_emoji_are_the_same_combination(emoji):
    assert len({(one.concept, one.tone, one.gender) for one in emoji.values()}) == len(emoji) > 3500


def test_a_tenth_is_held_out(emoji):
    assert 0.09 < sum(one.held_out for one in emoji.values()) / len(emoji) < 0.11


@pytest.mark.parametrize("part", ["concept", "tone", "gender"])
def test_each_part_occurs_in_training(emoji, part):
    found = [{getattr(one, part) for one in emoji.values() if one.held_out == held_out} for held_out in (False, True)]
    assert found[1] and found[1] <= found[0]


def test_the_split_is_the_documented_one(emoji):
    held_out = {"🤶🏾", "👨‍🚀", "👩🏼‍🚒", "👵🏽"}
    kept = {"👍", "👍🏻", "👨‍🚒", "🧑"}
    assert {text for text in held_out | kept if emoji[text].held_out} == held_out


def test_the_split_depends_on_neither_font_nor_seed_nor_language(font, emoji):
    kept = {
        tuple(one.text for one in load(config)[0].fetch.__self__.emoji)
        for config in (
            DataConfig(source="emoji", path=font, size=16),
            DataConfig(source="emoji", path=font, size=16, seed=5, held_out=0.5, language="de"),
        )
    }
    (texts,) = kept
    assert set(texts) == {text for text in emoji_font.DRAWN if not emoji[text].held_out}


def test_emoji_of_several_glyphs_are_skipped_and_counted(font, emoji):
    config = DataConfig(source="emoji", path=font, size=16)
    assert set(load(config)[0].fetch.__self__.drawn) == emoji_font.DRAWN
    state = data_state(config)
    assert (state["images"], state["skipped"]) == (5, len(emoji) - 5)


def test_the_state_follows_the_language(font):
    states = [data_state(DataConfig(source="emoji", path=font, size=16, language=name)) for name in ("en", "de")]
    assert states[0]["font"] == states[1]["font"] and states[0]["names"] != states[1]["names"]


def of(config: DataConfig, name: str) -> tuple:
    """Data set for training, and the indices of the variants of an emoji."""
    train = load(config)[0]
    names = [one.name for one in train.fetch.__self__.emoji]
    first = names.index(name) * config.variants
    return train, range(first, first + config.variants)


def test_an_image_is_the_glyph_on_the_background(font):
    train, (index,) = of(DataConfig(source="emoji", path=font, size=32, backgrounds=("navy",)), "red heart")
    image = train[index][0].permute(1, 2, 0)
    assert image.dtype == torch.uint8 and image.shape == (32, 32, 3)
    assert image[1, 31].tolist() == NAVY
    assert {tuple(pixel) for pixel in image[16].tolist()} >= {(255, 0, 0), tuple(NAVY)}


def test_no_color_exceeds_its_opacity(font):
    drawn = load(DataConfig(source="emoji", path=font, size=24))[0].fetch.__self__.drawn
    assert all((image[:3] <= image[3:]).all() for image in drawn.values())


def test_captions_are_names_in_templates(font):
    config = DataConfig(source="emoji", path=font, size=16, templates=("{}", "an emoji of {}"))
    train, (index,) = of(config, "person light skin tone")
    assert train.captions(index) == ("person light skin tone", "an emoji of person light skin tone")


def test_captions_may_be_in_another_language(font):
    train, (index,) = of(DataConfig(source="emoji", path=font, size=16, language="de"), "red heart")
    assert train.captions(index) == ("rotes herz",)


def test_classes_are_concepts(font, emoji):
    train, (index,) = of(DataConfig(source="emoji", path=font, size=16), "person light skin tone")
    assert train.classes[train[index][1]] == "person"
    assert len(train.classes) == len({one.concept for one in emoji.values()})


VARIED = {"size": 16, "variants": 80, "shift": 2, "flip": True, "backgrounds": ("white", "navy")}


def test_variants_show_the_background_that_their_caption_names(font):
    train, indices = of(DataConfig(source="emoji", path=font, **VARIED), "red heart")
    corners = {train.captions(index): train[index][0][:, 0, -1].tolist() for index in indices}
    assert corners == {("red heart",): WHITE, ("red heart on navy",): NAVY}


def red_columns(image: torch.Tensor) -> tuple[int, int]:
    """First and last column with red pixels."""
    columns = ((image[0] > 200) & (image[2] < 100)).any(0).nonzero()
    return int(columns.min()), int(columns.max())


def test_variants_are_shifted_and_mirrored_within_the_image(font):
    train, indices = of(DataConfig(source="emoji", path=font, **VARIED), "red heart")
    found = {red_columns(train[index][0]) for index in indices}
    assert len(found) == 10 and {0 <= first <= last < 16 for first, last in found} == {True}


def test_an_arrow_is_not_mirrored(font):
    train, indices = of(DataConfig(source="emoji", path=font, **VARIED), "left arrow")
    assert len({red_columns(train[index][0]) for index in indices}) == 5


def test_variants_are_determined_by_the_seed(font):
    sets = [load(DataConfig(source="emoji", path=font, seed=seed, **VARIED))[0] for seed in (0, 0, 1)]
    images = [torch.stack([image for image, _ in train]) for train in sets]
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])
    assert all(torch.equal(images[0][::80], other[::80]) for other in images)


def test_held_out_emoji_have_one_variant(font):
    assert all(len(load(DataConfig(source="emoji", path=font, size=16, variants=n))[1]) <= 5 for n in (1, 9))


@pytest.mark.parametrize("text", ["⬅️", "🇫🇷", "🏴‍☠️", "🕐", "5️⃣", "🆗", "🚶‍➡️", "🌒", "🔤", "🫱🏻‍🫲🏿"])
def test_a_mirror_changes_the_meaning(emoji, text):
    assert not may_flip(emoji[text])


@pytest.mark.parametrize("text", ["❤️", "👍🏻", "🧑‍🚒", "🐈", "🍁"])
def test_a_mirror_does_not_change_the_meaning(emoji, text):
    assert may_flip(emoji[text])


def test_a_missing_font_is_named():
    with pytest.raises(DataError, match=r"no font file nowhere\.ttf: .*fonts-noto-color-emoji"):
        find_font("nowhere.ttf")


@pytest.mark.parametrize(("color", "expected"), [("True", "/x/emoji.ttf"), ("False", None), (OSError(), None)])
def test_fontconfig_finds_the_font(monkeypatch, color, expected):
    def run(command, **options):
        if isinstance(color, OSError):
            raise color
        return subprocess.CompletedProcess(command, 0, f"{color} /x/emoji.ttf")

    monkeypatch.setattr(subprocess, "run", run)
    if expected:
        assert find_font() == Path(expected)
    else:
        with pytest.raises(DataError, match="fonts-noto-color-emoji"):
            find_font()


@pytest.mark.parametrize("kind", ["plain", "text"])
def test_a_font_without_colors_is_refused(font, tmp_path, kind):
    path = emoji_font.make(tmp_path / "plain.ttf", color=False)
    if kind == "text":
        path.write_text("no font")
    with pytest.raises(DataError, match=r"plain\.ttf: .*font"):
        load(DataConfig(source="emoji", path=str(path), size=16))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "digits", "flip": True}, "flip goes with source 'emoji' or 'folder' .*, not 'digits'"),
        ({"source": "emoji", "backgrounds": ["no color"]}, "'no color' is no color"),
        ({"source": "emoji", "backgrounds": []}, "at least one color"),
        ({"source": "emoji", "variants": 0}, "variants=0"),
        ({"source": "emoji", "shift": 4}, "less than half of size=8"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(**settings)


def test_an_unknown_language_is_refused():
    pytest.importorskip("emoji")
    with pytest.raises(ConfigError, match="language='xx': expected one of ar, de"):
        catalogue("xx")


@pytest.mark.skipif(not NOTO.exists(), reason="the font is not installed")
def test_the_font_of_noto_draws_most_emoji(emoji):
    config = DataConfig(source="emoji", path=str(NOTO), size=32)
    train, held_out = load(config)
    assert len(train) + len(held_out) == data_state(config)["images"] > 0.9 * len(emoji)
    drawn = [images.fetch.__self__.emoji for images in (train, held_out)]
    assert len({one.text[0] for one in drawn[0] if "\U0001f1e6" <= one.text[0] <= "\U0001f1ff"}) > 20
    for part in ("concept", "tone", "gender"):
        assert {getattr(one, part) for one in drawn[1]} <= {getattr(one, part) for one in drawn[0]}


def test_an_emoji_whose_mirror_image_is_another_one_is_not_mirrored(emoji):
    facing_right = {one.concept.removesuffix("\u200d➡") for one in emoji.values() if one.concept.endswith("\u200d➡")}
    assert len(facing_right) == 6
    assert not any(may_flip(one) for one in emoji.values() if one.concept in facing_right)


def test_emoji_without_skin_tone_are_repeated_in_training(font):
    config = DataConfig(source="emoji", path=font, size=16)
    (once, test), (often, same) = load(config), load(dataclasses.replace(config, plain_repeats=3))
    tones = [bool(one.tone) for one in once.fetch.__self__.emoji]
    assert 0 < sum(tones) < len(once)
    assert len(often) == sum(1 if tone else 3 for tone in tones) and len(same) == len(test)
