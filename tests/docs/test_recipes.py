"""The commands of the recipes run, with small models, images and batches on the same code path."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from support.pages import commands
from support.upstream import FLOWS, STARFLOW, make, settings, upstream_state

pytest.importorskip("diffusers", reason="latents and pipelines need diffusers")
from support import components

from starflow.cli import main
from starflow.settings import PRESETS, override, read_settings
from starflow.training.flow import FlowRunConfig
from starflow.training.plan import Machine, plan

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "recipes.md"
RECIPES = re.findall("^## (.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
# Upstream names of small models, in place of those of the published ones.
SMALL = {
    "afhq_model_8_768_8_8_0.07": "afhq_model_2_64_2_1_0.07",
    "imagenet_model_4_1024_8_8_0.15": "imagenet_model_4_64_3_1_0.15",
    "imagenet_model_4_1024_8_8_0.05": "imagenet_model_4_64_3_1_0.15",
    "imagenet64_model_2_768_8_8_0.05": "imagenet64_model_2_64_2_1_0.05",
}
STEPS = ["training.steps=2", "training.batch_size=4", "training.workers=0", "training.warmup_steps=1"]
LATENTS = ["model.channels=64", "model.layers=[1, 1]", "model.image_size=8", "data.size=8"]
CHANGES = {
    "tarflow-imagenet64-likelihood": ["model.channels=64", "model.layers=[1, 1]"],
    "starflow-imagenet256-class": LATENTS,
    "starflow-text256": [*LATENTS, f"model.text_dim={components.TEXT_DIM}", f"model.text_len={components.TEXT_LEN}"],
}


def save_images(folder: Path, count: int, side: int) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / f"{i}.png")


@pytest.fixture
def folder(stand_ins, tmp_path, monkeypatch) -> Path:
    """Folder with what the recipes read, at small sizes, in which they run one after the other."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for part in stand_ins.iterdir():
        if part.name != "converted":
            shutil.copytree(part, folder / part.name)
    for name, side in (("imagenet-64px/train", 64), ("imagenet-64px/val", 64), ("imagenet/train", 20)):
        for label in ("cat", "dog"):
            save_images(folder / name / label, 4, side)
    for name in ("captioned", "coco"):
        save_images(folder / name, 12, 16)
    lines = [json.dumps({"file_name": f"{i}.png", "text": "a cat"}) for i in range(12)]
    (folder / "captioned" / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "coco.txt").write_text("a cat\na dog\n" * 6, encoding="utf-8")
    for small in SMALL.values():
        flow = make(FLOWS[small])
        if flow.prior_variance is not None:
            flow.prior_variance.fill_(1.0)
        torch.save(upstream_state(flow), folder / f"{small}.pth")
    flow = make(STARFLOW)
    torch.save(upstream_state(flow), folder / "starflow_3B_t2i_256x256.pth")
    (folder / "starflow_3B_t2i_256x256.yaml").write_text(yaml.safe_dump(settings(flow)), encoding="utf-8")
    return folder


def small(words: list[str]) -> list[str]:
    """Return the arguments of a command for small models, images and batches."""
    for theirs, ours in SMALL.items():
        words = [word.replace(theirs, ours) for word in words]
    more: list[str] = []
    if words[0] == "train":
        changes = [*STEPS, *CHANGES[words[words.index("--preset") + 1]], "training.accumulate=2"]
        more = [part for change in changes for part in ("--set", change)]
    if words[0] == "encode":
        more = ["--set", "data.size=16"] + (["--length", str(components.TEXT_LEN)] if "--text" in words else [])
    if words[0] == "sample":
        words[words.index("--num") + 1] = "2"
    if words[0] == "eval" and "--fid" in words:
        more = ["--inception", "inception.pth", "--layer", "64"]
        more += [] if "--prompt-file" in words else ["--count", "12"]
        place = words.index("--reference") + 1
        words[place] = words[place] if words[place] == "coco" else "statistics.npz"
    return [*words, *more]


def arguments(command: str) -> list[str]:
    words = shlex.split(command, comments=True)
    return words[words.index("starflow") + 1 :]


@pytest.mark.parametrize("recipe", RECIPES)
def test_commands_of_a_recipe_run(recipe, folder, capsys):
    if "plot" in (found := [arguments(command) for command in commands(PAGE, recipe)]):
        pytest.importorskip("matplotlib")
    for words in found:
        assert "--fid" in words or main(small(words)) == 0, capsys.readouterr().err


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if "--fid" in "".join(commands(PAGE, recipe))])
def test_scores_of_a_recipe_are_measured(recipe, folder, capsys):
    pytest.importorskip("torch_fidelity")
    from support.inception import save_random_weights

    torch.manual_seed(0)
    save_random_weights(folder / "inception.pth")
    numbers = ["--inception", "inception.pth", "--layer", "64", "--save-statistics", "statistics.npz"]
    assert main(["eval", "--fid", "--images", "coco", *numbers]) == 0
    for command in commands(PAGE, recipe):
        assert main(small(arguments(command))) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    "preset, tflops, memory, days",
    [
        ("tarflow-imagenet64-likelihood", 67, "62 GB", "21 days"),
        ("starflow-imagenet256-class", 989, "66 GB", "14 days"),
        ("starflow-text256", 989, "70 GB", "12 days"),
    ],
)
def test_estimates_of_the_page_are_those_of_the_planner(preset, tflops, memory, days):
    (command,) = (arguments(each) for each in commands(PAGE) if preset in each)
    changes = [word for flag, word in itertools.pairwise(command) if flag == "--set"]
    given = read_settings(PRESETS / f"{preset}.yaml")
    override(given, changes)
    found = plan(FlowRunConfig.from_dict(given), Machine(gpus=8, tflops=tflops))
    assert found.fits
    assert (f"{found.peak / 1e9:.0f} GB", f"{found.days:.0f} days") == (memory, days)
    assert any(f"| {memory} | {days}" in line for line in PAGE.read_text(encoding="utf-8").splitlines())
