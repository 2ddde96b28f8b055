"""A bundled pipeline: opened by its name, drawn from by default, and its own guidance."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from support import components
from support.commands import fails
from support.imports import ROOT

from starflow import CheckpointError, Flow, Guidance, STARFlowPipeline, open_model
from starflow.cli import main, parser
from starflow.cli.sample import _default_folder
from starflow.models import checkpoint
from starflow.pipelines import FlowPipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints")
    shutil.copytree(checkpoint.BUNDLED / "digits", path / "digits")
    components.save_bundled(path / "emoji", "red blue heart cat")
    return path


@pytest.fixture(autouse=True)
def bundled(folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "BUNDLED", folder)
    return folder


def images(out) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted(out.glob("0*.png"))}


def draw(pipe, **options) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe("red heart", generator=torch.Generator().manual_seed(0), output_type="pt", **options).images


def test_a_name_opens_the_pipeline_with_float32_weights():
    opened = [open_model("emoji"), STARFlowPipeline.from_pretrained("emoji"), FlowPipeline.from_pretrained("emoji")]
    for pipe in opened:
        assert type(pipe) is STARFlowPipeline
        assert {part.dtype for part in (pipe.transformer, pipe.vae, pipe.text_encoder)} == {torch.float32}
        assert torch.equal(draw(pipe), draw(opened[0]))


def test_the_path_of_a_folder_of_the_same_name(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at emoji"):
        open_model(tmp_path.relative_to(tmp_path) / "emoji")


def test_a_pipeline_is_not_opened_as_a_flow(capsys):
    with pytest.raises(CheckpointError, match=r"emoji is a pipeline, not a flow: starflow\.open_model"):
        Flow.from_pretrained("emoji")
    assert "emoji is a pipeline, not a flow" in fails(capsys, "eval", "--checkpoint", "emoji")
    assert "no checkpoint at nowhere (config.json is not there); bundled: digits, emoji" in fails(
        capsys, "sample", "--checkpoint", "nowhere"
    )


def test_info_lists_and_describes_it(capsys):
    assert main(["info", "--checkpoint", "emoji", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["results"]
    assert found["checkpoints"]["emoji"].startswith("STARFlowPipeline with Flow(3 blocks of 1, 1, 2 layers")
    assert found["kind"] == "STARFlowPipeline" and found["checkpoint"].endswith("emoji")


@pytest.mark.parametrize(
    ("arguments", "name"), [(["--prompt", "red heart"], "emoji"), (["--prompt-file", "p"], "emoji"), ([], "digits")]
)
def test_a_prompt_draws_from_it_by_default(arguments, name, tmp_path, capsys):
    (tmp_path / "p").write_text("red heart\n")
    arguments = [str(tmp_path / "p") if word == "p" else word for word in arguments]
    assert main(["sample", *arguments, "--num", "1", "--images", "--out", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["arguments"]["checkpoint"] == name


def test_without_it_a_prompt_asks_for_a_pipeline(tmp_path, monkeypatch, capsys):
    shutil.copytree(checkpoint.BUNDLED / "digits", tmp_path / "digits")
    monkeypatch.setattr(checkpoint, "BUNDLED", tmp_path)
    assert "--prompt: digits is not the folder of a pipeline" in fails(capsys, "sample", "--prompt", "red heart")


@pytest.mark.parametrize(("installed", "name"), [(True, "emoji"), (False, "digits")])
def test_the_demo_takes_it_if_it_can_run(installed, name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: installed or None)
    assert parser(["demo"]).parse_args(["demo"]).checkpoint == name


def test_the_guidance_of_a_folder_is_that_of_its_calls(bundled, tmp_path, capsys):
    pipe = open_model("emoji")
    assert pipe.default_guidance == Guidance(2.0, "starflow")
    assert torch.equal(draw(pipe), draw(pipe, guidance_scale=2.0))
    assert not torch.equal(draw(pipe), draw(pipe, guidance_scale=3.6))
    assert main(["sample", "--prompt", "red heart", "--out", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["results"]["options"]["guidance"] == 2.0
    assert "guidance_scale=2)" in (bundled / "emoji" / "README.md").read_text()


def test_a_folder_without_guidance_has_the_weight_of_the_released_models(bundled, tmp_path):
    shutil.copytree(bundled / "emoji", tmp_path / "old")
    index = json.loads((tmp_path / "old" / "model_index.json").read_text())
    del index["guidance"]
    (tmp_path / "old" / "model_index.json").write_text(json.dumps(index))
    assert open_model(tmp_path / "old").default_guidance.weight == 3.6


def test_the_command_warns_of_unknown_words_in_one_line(tmp_path, capsys):
    (tmp_path / "prompts").write_text("green heart\nred cat\nblue dog\n")
    arguments = ["--prompt-file", str(tmp_path / "prompts"), "--negative-prompt", "a fish", "--batch-size", "1"]
    assert main(["sample", *arguments, "--out", str(tmp_path / "out")]) == 0
    words = "'green', 'dog', 'fish'"
    assert capsys.readouterr().err == f"starflow: warning: the text encoder does not know {words}\n"
    assert len(images(tmp_path / "out")) == 3


@pytest.mark.parametrize(("guidance", "words"), [(2.0, "'green', 'dog', 'fish'"), (0.0, "'green', 'dog'")])
def test_a_call_warns_of_unknown_words_of_its_prompts_once(guidance, words):
    with pytest.warns(UserWarning, match="know") as caught:
        open_model("emoji")(("green heart", "blue dog"), negative_prompt="a fish", guidance_scale=guidance)
    warned = [str(each.message) for each in caught if each.category is UserWarning]
    assert warned == [f"the text encoder does not know {words}"]


def test_spaces_around_a_prompt_do_not_count(tmp_path):
    assert main(["sample", "--prompt", "red heart", "--out", str(tmp_path)]) == 0
    assert main(["sample", "--prompt", " red heart\n", "--num", "2", "--out", str(tmp_path)]) == 0


@pytest.mark.parametrize("prompt", ["", " \t"])
def test_an_empty_prompt_is_refused(prompt, capsys):
    assert f"argument --prompt: {prompt!r} is not a prompt" in fails(capsys, "sample", "--prompt", prompt)


def test_a_negative_prompt_changes_the_image_and_the_prompt_itself_undoes_guidance(tmp_path):
    runs = {
        "none": ["--guidance", "0"],
        "same": ["--negative-prompt", "red heart"],
        "other": ["--negative-prompt", "cat"],
    }
    for name, arguments in runs.items():
        assert main(["sample", "--prompt", "red heart", *arguments, "--out", str(tmp_path / name)]) == 0
    drawn = {name: images(tmp_path / name)["000000-0000.png"].astype(int) for name in runs}
    assert abs(drawn["same"] - drawn["none"]).max() <= 1 < abs(drawn["other"] - drawn["none"]).max()


def test_an_image_depends_on_seed_prompt_and_number_alone(tmp_path):
    (tmp_path / "prompts").write_text("red heart\nblue cat\n")
    several = ["--prompt-file", str(tmp_path / "prompts"), "--num", "3"]
    assert main(["sample", *several, "--out", str(tmp_path / "several")]) == 0
    assert main(["sample", "--prompt", "red heart", "--num", "1", "--out", str(tmp_path / "one")]) == 0
    assert main(["sample", *several, "--seed", "1", "--out", str(tmp_path / "seed")]) == 0
    several, one, seed = (images(tmp_path / name) for name in ("several", "one", "seed"))
    assert np.array_equal(one["000000-0000.png"], several["000000-0000.png"])
    assert len({image.tobytes() for image in (*several.values(), *seed.values())}) == 12


def test_a_size_that_the_model_was_not_trained_on_is_named(tmp_path, capsys):
    arguments = ["sample", "--prompt", "red heart", "--out", str(tmp_path)]
    assert main([*arguments, "--height", "24"]) == 0
    error = capsys.readouterr().err
    assert "warning: the model was trained on images of 16x16 pixels alone; others may be broken" in error


def test_a_variant_that_does_not_exist_is_named(tmp_path, capsys):
    error = fails(capsys, "sample", "--prompt", "cat", "--variant", "fp16", "--out", str(tmp_path / "out"))
    assert "fp16" in error


@pytest.mark.parametrize("flag", ["--prompt", "--negative-prompt"])
def test_bytes_that_are_no_text_are_refused(flag, capsys):
    assert "is not UTF-8 text" in fails(capsys, "sample", flag, "cat \udcff")


def test_the_folder_of_a_long_prompt_has_whole_words():
    for prompt, folder in (
        ("a red heart!", "samples/a-red-heart-7"),
        ("word " * 50, f"samples/{'word-' * 15}7"),
        ("w" * 200, f"samples/{'w' * 79}-7"),
    ):
        assert _default_folder(prompt, 7) == folder


def test_a_negative_prompt_alone_asks_for_a_prompt(capsys):
    error = fails(capsys, "sample", "--negative-prompt", "cat")
    assert error.endswith("--prompt or --prompt-file: this pipeline draws text")


@pytest.mark.parametrize(
    ("prompts", "count", "shape"),
    [(["red heart"], 9, (3, 3)), (["red heart", "blue cat"], 4, (2, 4)), (["cat"], 2, (1, 2))],
)
def test_one_picture_shows_all_images(prompts, count, shape, tmp_path, capsys):
    (tmp_path / "prompts").write_text("\n".join(prompts))
    arguments = ["--prompt-file", str(tmp_path / "prompts"), "--num", str(count), "--out", str(tmp_path / "out")]
    assert main(["sample", *arguments]) == 0
    grid = tmp_path / "out" / "grid.png"
    assert capsys.readouterr().out.startswith(f"{grid}: {len(prompts) * count} images in ")
    width, height = Image.open(grid).size
    rows, columns = shape
    scale = 512 // (columns * 17 - 1)
    assert (height, width) == (scale * (rows * 17 - 1), scale * (columns * 17 - 1))


def test_all_files_of_bundled_pipelines_are_packaged(bundled, tmp_path, monkeypatch):
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.chdir(tmp_path)
    for package in ("starflow", "starflow_kernels"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text('__version__ = "1"\n')
    shutil.copytree(bundled, tmp_path / "starflow" / "checkpoints")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    distribution = setuptools.Distribution({"script_name": "setup.py"})
    distribution.parse_config_files(["pyproject.toml"])
    command = distribution.get_command_obj("build_py")
    command.ensure_finalized()
    packaged = {f"{source}/{name}" for _, source, _, names in command.data_files for name in names}
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("checkpoints/**/*") if path.is_file()}
    assert files <= packaged and "starflow/checkpoints/emoji/vae/config.json" in files


def test_two_prompts_and_two_seeds_are_drawn_into_folders_of_their_own(bundled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for prompt, seed in (("red cat", "0"), ("A dog!", "0"), ("red cat", "1")):
        assert main(["sample", "--prompt", prompt, "--seed", seed]) == 0
    folders = {path.name for path in (tmp_path / "samples").iterdir()}
    assert folders == {"red-cat-0", "a-dog-0", "red-cat-1"}
