"""The judges, times and picture of a pipeline of emoji: what they count as right, and what they compute."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from PIL import Image, ImageColor

pytest.importorskip("diffusers")
pytest.importorskip("emoji")

from support import components

from benchmarks.emoji import classifier, judge, picture, speed
from benchmarks.emoji.distances import as_it_is, features, frechet, lossless_bits, nearest
from benchmarks.emoji.real import RealEmoji, ink
from starflow.data.emoji import catalogue
from starflow.seeds import generator

SIZE = 32
TEXTS = ("❤️", "👍", "👍🏻", "👍🏾", "🐈", "⬅️", "🧑‍🚒", "👩🏼‍🚒", "👨‍🚀", "👵🏽", "🤶🏾", "🇳🇴", "🇸🇯")
TWINS = TEXTS.index("🇳🇴"), TEXTS.index("🇸🇯")


@pytest.fixture(scope="module")
def real():
    """Emoji with images of random patches, of which the last two are the same."""
    by_text = {one.text: one for one in catalogue()}
    patches = torch.rand(len(TEXTS), 3, 4, 4, generator=generator(0))
    images = torch.ones(len(TEXTS), 3, SIZE, SIZE)
    images[..., 2:-2, 2:-2] = torch.nn.functional.interpolate(patches, SIZE - 4)
    images[TWINS[1]] = images[TWINS[0]]
    return RealEmoji([by_text[text] for text in TEXTS], judge.as_pixels(images))


@pytest.fixture(scope="module")
def pipe():
    made = components.pipeline(denoise=0.0)
    made.transformer = components.flow_model(image_size=SIZE // 2, layers=[1, 1], text_len=48)
    return made


@pytest.fixture(scope="module")
def results(real, pipe):
    parts = judge.asked(real, seen=3, seed=0)
    del parts["validation"]
    return judge.judge(real, classifier.build(real).eval(), pipe.vae, pipe, parts=parts, guidance=[0.0, 1.0], seed=0)


def test_the_validation_part_is_neither_seen_nor_held_out(real):
    every = RealEmoji(list(catalogue()), real.images[:1].expand(len(catalogue()), -1, -1, -1))
    parts = judge.asked(every, seen=len(every), seed=0)
    assert len(parts["validation"]) > 150 and sum(map(len, parts.values())) == len(every)
    assert len(set().union(*parts.values())) == len(every)


def test_all_held_out_emoji_and_a_subset_of_the_others_are_judged(real, results):
    held_out = sum(one.held_out for one in real.emoji)
    assert held_out == 4
    counts = {(row["images"], row["part"], row["judge"]): row["count"] for row in results["shares"]}
    sources = ("augmented", "reconstruction", "guidance 0", "guidance 1")
    assert counts == {
        (source, part, by): count
        for source in sources
        for part, count in (("seen", 3), ("held_out", held_out))
        for by in ("nearest", "classifier")
    }


def test_images_are_those_of_the_names_and_of_the_numbers(real, pipe):
    both = judge.drawn(pipe, real, [4, 7], guidance=0.0, seed=0)
    alone = judge.drawn(pipe, real, [7], guidance=0.0, seed=0)
    other = judge.drawn(pipe, real, [7], guidance=0.0, seed=1)
    assert torch.equal(both[1:], alone) and not torch.equal(alone, other)


def test_the_nearest_of_a_real_image_is_the_image(real):
    found = judge.verdicts(classifier.build(real).eval(), real, ink(real.images))["nearest"]
    assert set(judge.shares(real, list(range(len(real))), found).values()) == {1}


def test_an_emoji_with_the_same_image_is_right_but_not_plainly_right(real):
    seen = [judge.Seen(real.emoji[TWINS[0]].concept, "", "")]
    assert judge.shares(real, [TWINS[1]], seen)["concept_and_tone"] == 1
    assert judge.shares(real, [TWINS[1]], seen, plain=True)["concept_and_tone"] == 0


def test_tones_and_genders_count_where_the_asked_emoji_has_one(real):
    rows = [TEXTS.index(text) for text in ("👍", "👍🏻", "👍🏾", "❤️", "👨‍🚀", "👵🏽")]
    thumb, astronaut, old = (real.emoji[rows[i]].concept for i in (0, 4, 5))
    seen = [(thumb, "dark", ""), (thumb, "light", "male"), (thumb, "light", ""), (thumb, "", "")]
    seen += [(astronaut, "", "female"), (old, "medium", "female")]
    found = judge.shares(real, rows, [judge.Seen(*one) for one in seen])
    assert found == {"concept": 5 / 6, "tone": 2 / 3, "gender": 1 / 2, "concept_and_tone": 3 / 6}


def distances(images, real, mirrored):
    """Mean square differences (B, N) in the order of the real images."""
    numbers, squares = nearest(images, real, torch.tensor(mirrored), as_it_is)
    return squares.gather(1, numbers.argsort(1))


def test_distances_pass_over_shifts_and_mirror_images_where_these_keep_the_meaning():
    x = torch.rand(1, 3, 8, 8, generator=generator(0))
    x[..., :2], x[..., -2:], x[..., :2, :], x[..., -2:, :] = 0, 0, 0, 0
    moved = torch.stack([x[0].roll((2, -1), (1, 2)), x[0].flip(-1)])
    found = distances(moved, x.repeat(2, 1, 1, 1), [False, True])
    assert found[0].max() < 1e-6 and found[1, 1] < 1e-6 and found[1, 0] > 1e-2


def test_distances_are_mean_squares():
    assert distances(torch.full((1, 3, 8, 8), 0.5), torch.full((1, 3, 8, 8), 0.25), [False]).item() == 1 / 16


def test_a_training_image_is_counted_as_memorized(real):
    images, mirrored, errors = real.images, real.mirrored(), torch.full((len(real),), 0.01)
    others = images[:1].flip(-2)
    found = judge.memory(torch.cat([images[:1], others]), images, mirrored, errors)
    assert found["nearer_than_reconstruction"] == 1 / 2
    assert found["distance"]["0%"] < 1e-3 < found["distance"]["100%"]


def test_frechet_distance_of_gaussians():
    x = torch.randn(500, 3, generator=generator(0), dtype=torch.float64)
    one = torch.ones(3, dtype=torch.float64)
    assert frechet(x, x, one) == pytest.approx(0, abs=1e-9)
    assert frechet(x, x + 2, 2 * one) == pytest.approx(3)
    centered = x - x.mean(0)
    assert frechet(centered, 3 * centered, one) == pytest.approx(4 * torch.cov(x.T).trace().item())


def test_features_are_the_same_in_each_process(real):
    found = features(ink(real.images))
    assert found.shape == (len(real), 128)
    assert torch.equal(found, features(ink(real.images))) and (found.std(0) > 0).all()


def test_bits_of_latents_from_a_standard_normal_and_a_flow_that_changes_nothing():
    pipe = components.pipeline()
    flow = pipe.transformer
    for name, parameter in flow.named_parameters():
        if "proj_out" in name:
            parameter.data.zero_()
    shape = flow.config.image_channels, flow.config.image_size, flow.config.image_size
    std = (1 - flow.config.noise_std**2) ** 0.5
    moments = torch.stack([torch.zeros(40, *shape), torch.full((40, *shape), std)], 1)
    found = judge.likelihood(pipe, moments, ["cat"] * 40, seed=0)
    assert found["bits_per_dim"] == pytest.approx(math.log2(2 * math.pi * math.e) / 2, abs=4 * found["standard_error"])
    assert 0 < found["standard_error"] < 0.02


def test_bits_of_a_file_are_eight_per_byte(tmp_path):
    image = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8, generator=generator(0))
    Image.fromarray(image[0].permute(1, 2, 0).contiguous().numpy()).save(tmp_path / "x.png", optimize=True)
    expected = 8 * (tmp_path / "x.png").stat().st_size / (3 * 16 * 16)
    assert lossless_bits(image, "PNG", optimize=True) == expected > 8


def test_classifier_learns_and_is_kept(real, tmp_path, monkeypatch):
    model = classifier.load_or_train(tmp_path, real, steps=150, batch=12)
    assert min(classifier.accuracy(model, real).values()) > 0.9
    monkeypatch.setattr(classifier, "train", None)
    kept = classifier.load_or_train(tmp_path, real, steps=150, batch=12)
    assert torch.equal(classifier.classify(kept, ink(real.images)), classifier.classify(model, ink(real.images)))


def test_classifier_is_trained_again_for_other_emoji(real, tmp_path):
    other = dataclasses.replace(real, images=real.images.flip(0))
    first, second = (classifier.load_or_train(tmp_path, one, steps=1, batch=4) for one in (real, other))
    assert not torch.equal(first.head.weight, second.head.weight)


@pytest.mark.parametrize("batch", [1, 3])
def test_other_loops_draw_the_same(pipe, batch):
    row = speed.measure(pipe, batch, repeats=1)
    assert 0 < max(row["difference_of_latents"].values()) < 1e-4
    assert sum(row["share"].values()) == pytest.approx(1)


def test_prompts_of_the_picture_are_on_the_side_where_they_stand():
    picture.check_prompts(picture.SEEN, picture.HELD_OUT)
    for wrong in ((picture.HELD_OUT, ()), ((), picture.SEEN), (("no emoji",), ())):
        with pytest.raises(ValueError, match=wrong[0][0] if wrong[0] else wrong[1][0]):
            picture.check_prompts(*wrong)


def test_picture_marks_held_out_prompts():
    tile = Image.new("RGB", (64, 64), "white")
    above_the_legend = (0, 0, 1008, 180)
    grids = [picture.compose([tile], ["mermaid"], [held_out]).crop(above_the_legend) for held_out in (False, True)]
    colors = [{color for _, color in grid.getcolors(10**6)} for grid in grids]
    assert [ImageColor.getrgb(picture.MARK) in found for found in colors] == [False, True]


def test_speed_draws_names_of_emoji():
    assert set(speed.PROMPTS) <= {one.name for one in catalogue()}
