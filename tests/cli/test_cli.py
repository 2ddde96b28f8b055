"""The command line, in process and as a program: reports, reproducibility, and errors in one line."""

import argparse
import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from PIL import Image
from support.commands import fails

from starflow import Flow
from starflow.cli import COMMANDS, main, parser
from starflow.inversion.request import TOLERANCE
from starflow.settings import PRESETS, presets, read_settings
from starflow_kernels import __version__

TINY = {
    "model": {
        "image_size": 8, "image_channels": 1, "patch_size": 4, "channels": 16, "layers": [1, 1], "head_dim": 8,
        "num_classes": 10, "levels": 17,
    },
    "data": {"source": "digits"},
    "training": {"steps": 3, "batch_size": 16, "learning_rate": 1e-3, "log_every": 1},
}  # fmt: skip


@pytest.fixture
def settings(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return str(path)


@pytest.fixture
def run(tmp_path, settings):
    folder = str(tmp_path / "run")
    assert main(["train", "--config", settings, "--out", folder, "--quiet"]) == 0
    return folder


def digest(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_train_writes_a_run_and_a_report(tmp_path, settings):
    report = tmp_path / "report.json"
    out = tmp_path / "run"
    assert main(["train", "--config", settings, "--out", str(out), "--quiet", "--json", str(report)]) == 0
    written = {p.name for p in out.iterdir()}
    assert written == {"config.json", "model.safetensors", "settings.yaml", "metrics.jsonl", "checkpoints", "samples"}
    measured = json.loads(report.read_text())["results"]
    assert measured["steps"] == 3 and measured["last"]["step"] == 3


def test_seeds_reproduce_to_the_bit(tmp_path, settings):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        arguments = ["--config", settings, "--quiet", "--seed", seed, "--set", "training.dropout=0.1"]
        assert main(["train", "--out", str(tmp_path / name), *arguments]) == 0
        sample = ["--num", "12", "--seed", seed, "--out", str(tmp_path / name / "drawn")]
        assert main(["sample", "--checkpoint", str(tmp_path / "a"), *sample]) == 0
    weights = [digest(tmp_path / name / "model.safetensors") for name in "abc"]
    grids = [digest(tmp_path / name / "drawn" / "grid.png") for name in "abc"]
    assert weights[0] == weights[1] != weights[2] and grids[0] == grids[1] != grids[2]


def test_sample(tmp_path, run, capsys):
    out = tmp_path / "drawn"
    arguments = ["sample", "--checkpoint", run, "--out", str(out), "--num", "20", "--batch-size", "7", "--certify"]
    assert main([*arguments, "--images", "--verbose", "--json"]) == 0
    captured = capsys.readouterr()
    results, printed = json.loads(captured.out)["results"], captured.err
    assert 0 <= results["certificate_mean"] <= results["certificate"] < 1e-4 and results["count"] == 20
    assert "20 images in " in printed and "certificate: max |flow(x) - z| = " in printed and ", mean " in printed
    assert "block 1: sequential: 3 passes for 4 tokens" in printed
    assert [block["samples"] for block in results["blocks"]] == [20, 20] and results["steps"] == 6
    assert len(list(out.glob("0*.png"))) == 20
    assert Image.open(out / "000009-0001.png").size == (8, 8)
    assert main(["sample", "--checkpoint", run, "--out", str(out), "--label", "3", "--guidance", "1.5"]) == 0
    assert main(["sample", "--checkpoint", run, "--out", str(out), "--label", "none", "--dtype", "bfloat16"]) == 0


def test_methods(tmp_path, run, capsys):
    base = ["sample", "--checkpoint", run, "--num", "10", "--out", str(tmp_path), "--json"]
    drawn = {}
    for method in (["auto"], ["sequential"], ["jacobi", "--window", "2", "--tol", "1e-6"], ["jacobi", "--tol", "0"]):
        report = tmp_path / "report.json"
        assert main([*base, str(report), "--certify", "--verbose", "--method", *method]) == 0
        results = json.loads(report.read_text())["results"]
        assert results["method"] == ("jacobi" if "jacobi" in method else "sequential")
        assert {block["window"] for block in results["blocks"]} == {2 if "--window" in method else 0}
        assert results["certificate"] < 1e-4
        drawn[tuple(method)] = digest(tmp_path / "grid.png")
    assert drawn["auto",] == drawn["sequential",] == drawn["jacobi", "--tol", "0"]
    assert "block 0: quasi-Newton, window 2: " in capsys.readouterr().out


@pytest.mark.parametrize("method", ["sequential", "jacobi"])
def test_weights_of_one_byte(tmp_path, run, method):
    errors, report = [], tmp_path / "report.json"
    for quantize in ("none", "int8", "fp8"):
        options = ["--quantize", quantize, "--method", method, "--certify", "--json", str(report)]
        assert main(["sample", "--checkpoint", run, "--num", "10", "--out", str(tmp_path), *options]) == 0
        errors.append(json.loads(report.read_text())["results"]["certificate_mean"])
    assert 0 < errors[0] < errors[1] < errors[2]


def test_flags_of_the_released_code(tmp_path, run, capsys):
    base = ["sample", "--checkpoint", run, "--num", "4", "--out", str(tmp_path)]
    report = tmp_path / "report.json"
    assert main([*base, "--jacobi", "1", "--jacobi_block_size", "2", "--json", str(report)]) == 0
    results = json.loads(report.read_text())["results"]
    assert results["method"] == "jacobi" and results["blocks"][0]["window"] == 2 and not capsys.readouterr().err
    for threshold, tol in (("0.001", f"{TOLERANCE:g}"), ("1e-14", "1e-07")):
        assert main([*base, "--jacobi", "1", "--jacobi_th", threshold, "--jacobi_max_iter", "32"]) == 0
        assert f"jacobi iterates to --tol {tol}, not to the upstream threshold" in capsys.readouterr().err
    assert main([*base, "--jacobi", "0", "--jacobi_th", "0.001", "--json", str(report)]) == 0
    assert json.loads(report.read_text())["results"]["method"] == "sequential"


def test_sample_of_the_bundled_digits(tmp_path):
    assert main(["sample", "--num", "10", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "grid.png").exists()


def test_eval(run, tmp_path, capsys):
    report = tmp_path / "eval.json"
    assert main(["eval", "--checkpoint", run, "--draws", "1", "--json", str(report)]) == 0
    results = json.loads(report.read_text())["results"]
    assert results["images"] == 360 and results["logdet_error"] < 1e-9
    assert 2 < results["likelihood"]["bits_per_dim"] < 5 and 0 <= results["bayes_accuracy"] <= 1
    assert results["inverse_of_forward"]["above_1e3"] == 0 and results["forward_of_inverse"]["above_1e3"] == 0
    printed = capsys.readouterr().out
    assert "bits/dim" in printed and "accuracy as a classifier " in printed
    assert printed.count(" of 4096 values, 0 above 1e-3 and 0 above 1e-2\n") == 2


def test_eval_says_why_there_is_no_likelihood(settings, tmp_path, capsys):
    run = str(tmp_path / "run")
    assert main(["train", "--config", settings, "--out", run, "--quiet", "--set", "model.noise_std=0.1"]) == 0
    assert main(["eval", "--checkpoint", run]) == 0
    assert "bits/dim not measured: the model was trained with Gaussian noise" in capsys.readouterr().out


def test_eval_of_a_folder(run, tmp_path, capsys):
    (tmp_path / "images" / "a").mkdir(parents=True)
    Image.new("L", (9, 9)).save(tmp_path / "images" / "a" / "x.png")
    assert "grey levels" in fails(capsys, "eval", "--checkpoint", run, "--data", str(tmp_path / "images"))


def test_resume_continues(tmp_path, settings, capsys):
    folder = str(tmp_path / "run")
    assert main(["train", "--config", settings, "--out", folder, "--quiet", "--set", "training.steps=2"]) == 0
    assert "holds a run" in fails(capsys, "train", "--config", settings, "--out", folder)
    assert "drop --set" in fails(capsys, "train", "--resume", folder, "--set", "training.steps=3")
    assert main(["train", "--resume", folder, "--quiet"]) == 0


def test_without_a_command_there_is_help(capsys):
    with pytest.raises(SystemExit) as exit:
        main([])
    printed = capsys.readouterr().out
    assert exit.value.code == 0 and "try: starflow sample" in " ".join(printed.split())
    assert all(f"    {name} " in printed or f"    {name}\n" in printed for name in COMMANDS)


@pytest.mark.parametrize("arguments", [["info"], ["--help"], ["info", "--json"]])
def test_a_closed_pipe_ends_a_command_quietly(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "starflow", *arguments]
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    found = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=buffered)
    os.close(writer)
    assert found.returncode == 141 and "Error" not in found.stderr


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0 and capsys.readouterr().out == f"starflow {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained_with_its_default(command):
    subparsers = next(action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    sub = subparsers.choices[command]
    assert sub.description[0].isupper() and sub.description.endswith(".")
    in_groups = {id(action) for group in sub._mutually_exclusive_groups for action in group._group_actions}
    for action in sub._actions:
        assert action.help[0].isupper() and action.help.endswith("."), action.option_strings
        explained = any(part in action.help for part in ("Default: ", "Required.", "Same as "))
        assert explained or id(action) in in_groups or action.dest in ("help", "version"), action.option_strings


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    example = text.split("example:")[1].strip()
    assert parser().parse_args(example.split()[1:]).command == command


@pytest.mark.parametrize("name", presets())
def test_presets_are_complete(name):
    from starflow.training.flow import FlowRunConfig

    with torch.device("meta"):
        Flow(FlowRunConfig.from_dict(read_settings(PRESETS / f"{name}.yaml")).model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "--nmu", "3"], "--nmu"),
        (["sample", "--num", "0"], "--num"),
        (["sample", "--denoise", "nan"], "denoise=nan"),
        (["info", "--device", "nowhere"], "--device nowhere"),
        (["sample", "--seed", "-1"], "--seed"),
        (["sample", "--dtype", "int8"], "int8"),
        (["sample", "--label", "11"], "--label 11"),
        (["sample", "--checkpoint", "nowhere"], "nowhere"),
        (["sample", "--device", "cuda:7"], "--device cuda:7"),
        (["sample", "--device", "abacus"], "--device abacus"),
        (["sample", "--guidance", "-2"], "--guidance -2: expected a finite weight of at least 0"),
        (["sample", "--guidance", "1", "--label", "none"], "attention temperature"),
        (["sample", "--num", "2", "--out", "/dev/full/x"], "/dev/full"),
        (["sample", "--method", "guess"], "method='guess': expected auto or one of sequential, jacobi"),
        (["sample", "--window", "8"], "window=8: for method='jacobi', not 'auto'"),
        (["sample", "--method", "jacobi", "--tol", "-1"], "tol=-1.0"),
        (["sample", "--method", "jacobi", "--tol", "nan"], "tol=nan"),
        (["sample", "--method", "sequential", "--jacobi", "1"], "--jacobi 1 and --method sequential"),
        (["sample", "--jacobi", "1", "--jacobi_th", "-1"], "--jacobi_th -1.0"),
        (["calibrate"], "digits is bundled and cannot be changed: name a folder for a calibrated copy with --out"),
        (["calibrate", "--out", "."], "--out . exists already"),
        (["calibrate", "--out", "x", "--tol", "-1"], "tol=-1.0"),
        (["calibrate", "--checkpoint", "nowhere"], "nowhere"),
        (["info", "--json", "/dev/full/x.json"], "/dev/full"),
        (["eval", "--data", "nowhere"], "no folder of images at nowhere (relative to "),
        (["train", "--preset", "mnist"], "mnist"),
        (["train"], "--preset"),
        (["train", "--resume", "nowhere"], "nowhere"),
        (["train", "--preset", "digits", "--set", "model.chanels=3"], "chanels"),
        (["train", "--preset", "digits", "--set", "chanels=3"], "SECTION.NAME=VALUE"),
        (["train", "--preset", "digits", "--set", "training.learning_rate=fast"], "learning_rate='fast'"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--verbose"], "COMMAND"),
    ],
)
def test_errors_are_one_line(arguments, message, capsys):
    if "cuda:7" in arguments and torch.cuda.device_count() > 7:
        pytest.skip("this machine has that device")
    assert message in fails(capsys, *arguments)


def test_a_damaged_checkpoint(run, tmp_path, capsys):
    path = f"{run}/model.safetensors"
    with open(path, "r+b") as file:
        file.truncate(500)
    assert "model.safetensors" in fails(capsys, "sample", "--checkpoint", run, "--out", str(tmp_path / "drawn"))
    assert not (tmp_path / "drawn").exists()


def test_numbers_in_scientific_notation(tmp_path, settings):
    out = tmp_path / "run"
    arguments = ["--set", "training.learning_rate=1e-5", "--quiet"]
    assert main(["train", "--config", settings, "--out", str(out), *arguments]) == 0
    assert read_settings(out / "settings.yaml")["training"]["learning_rate"] == 1e-5


def test_as_a_program():
    command = [sys.executable, "-m", "starflow", "info", "--checkpoint", "digits", "--json"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(found.stdout)["results"]["token_dim"] == 4
    assert "Versions\n" in found.stderr


def test_without_a_terminal_there_is_no_progress_bar(tmp_path, settings):
    command = [sys.executable, "-m", "starflow", "train", "--config", settings, "--out", str(tmp_path / "run")]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stderr == "" and found.stdout.startswith(f"{tmp_path / 'run'}: 3 steps, ")


@pytest.mark.parametrize(
    ("command", "limit", "left"),
    [
        ("train", 200, []),
        ("train", 100000, ["config.json", "metrics.jsonl", "model.safetensors", "settings.yaml"]),
        ("sample", 200, []),
    ],
)
def test_a_write_that_the_system_refuses_midway(command, limit, left, tmp_path, settings):
    """A limit on the size of files stands for a full disk: the first bytes are written, the rest is refused."""
    out = tmp_path / "out"
    # torch 2.9 writes a file when its compiler is imported, as the first optimizer does.
    code = (
        "import resource, sys, torch._dynamo; from starflow.cli import main\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); sys.exit(main(sys.argv[1:]))"
    )
    train = ["--config", settings, "--quiet", "--set", "training.sample_every=0"]
    arguments = {"train": train, "sample": ["--num", "10"]}[command]
    found = subprocess.run(
        [sys.executable, "-c", code, command, *arguments, "--out", str(out)], capture_output=True, text=True
    )
    assert found.returncode == 2 and found.stderr.strip().startswith(f"starflow {command}: error: cannot write ")
    assert f" {out}" in found.stderr and len(found.stderr.strip().splitlines()) == 1
    assert sorted(path.name for path in out.rglob("*") if path.is_file()) == left


def test_tensorboard_is_optional(tmp_path, settings, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    arguments = ["train", "--config", settings, "--out", str(tmp_path / "run"), "--tensorboard"]
    assert "tensorboard" in fails(capsys, *arguments)
