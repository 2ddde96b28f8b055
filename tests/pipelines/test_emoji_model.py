"""The bundled pipeline of emoji: what a stranger types, and what comes out."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from starflow import open_model
from starflow.cli import main
from starflow.models.checkpoint import BUNDLED

MOST_BYTES = 20_000_000


@pytest.fixture(scope="module")
def pipe():
    pipe = open_model("emoji")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompt: str, seed: int = 0, **options) -> torch.Tensor:
    """Return an image (3, 64, 64) on [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, generator=generator, output_type="pt", **options).images[0].float()


def color(image: torch.Tensor) -> torch.Tensor:
    """Return the mean color (3,) of all pixels that are not near to white."""
    return image[:, image.min(0).values < 0.8].mean(1)


def test_it_fits_and_states_its_licenses():
    folder = BUNDLED / "emoji"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= MOST_BYTES
    for name in ("transformer/NOTICE", "README.md"):
        text = " ".join((folder / name).read_text().split())
        assert "SIL Open Font License" in text and "Unicode License" in text


@pytest.mark.parametrize(
    ("prompt", "channel"), [("red heart", 0), ("blue heart", 2), ("green heart", 1), ("green apple", 1), ("tomato", 0)]
)
def test_colors_are_those_of_the_prompt(prompt, channel, pipe):
    for seed in range(3):
        assert color(draw(pipe, prompt, seed)).argmax() == channel


def test_the_background_is_white(pipe):
    image = draw(pipe, "red heart")
    assert torch.stack([image[:, y, x] for y in (0, -1) for x in (0, -1)]).min() > 0.95


def test_skin_tones_are_in_order(pipe):
    tones = ["light", "medium-light", "medium", "medium-dark", "dark"]
    brightness = [color(draw(pipe, f"waving hand {tone} skin tone")).mean().item() for tone in tones]
    assert brightness == sorted(brightness, reverse=True)


@pytest.mark.parametrize("prompt", ["Red Heart", "RED HEART!", "an emoji of the red heart"])
def test_case_punctuation_and_small_words_do_not_count(prompt, pipe):
    assert torch.equal(draw(pipe, prompt), draw(pipe, "red heart"))


@pytest.mark.parametrize("prompt", ["red hearts", "heart red", "a red heart please"])
def test_a_red_heart_by_other_words(prompt, pipe, recwarn):
    image, named = draw(pipe, prompt), draw(pipe, "red heart")
    assert color(image).argmax() == 0
    assert (image - named).abs().mean() < 0.1


def test_unknown_words_are_left_out_and_named(pipe):
    with pytest.warns(UserWarning, match="the text encoder does not know 'delicious', 'galactic'"):
        image = draw(pipe, "delicious galactic pizza")
    assert torch.equal(image, draw(pipe, "pizza"))


@pytest.mark.parametrize("prompt", ["\N{HEAVY BLACK HEART}", "!?", "xyzzy"])
def test_a_prompt_without_a_known_word_is_named(prompt, pipe):
    with pytest.warns(UserWarning, match=f"the text encoder does not know {re.escape(repr(prompt))}"):
        draw(pipe, prompt)


def test_the_flow_is_exact(pipe):
    report = pipe(["pizza", "rocket"], certify=True, output_type="latent").report
    assert report.certificate < 1e-4


def test_the_command_draws_from_it_without_a_name(tmp_path, capsys):
    arguments = ["sample", "--prompt", "snowman", "--num", "4", "--images", "--out", str(tmp_path), "--json"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["arguments"]["checkpoint"] == "emoji"
    drawn = [np.asarray(Image.open(path)) for path in sorted(tmp_path.glob("0*.png"))]
    assert [image.shape for image in drawn] == [(64, 64, 3)] * 4
    assert len({image.tobytes() for image in drawn}) == 4
