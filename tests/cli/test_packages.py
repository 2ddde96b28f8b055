"""The command line with only some packages installed: it works with the required ones, and names a missing one."""

import importlib.util
import json

import pytest
from PIL import Image
from support.imports import ROOT, python

import starflow
from starflow.cli.packages import PACKAGES, install_line

REQUIRED = [package.name for package in PACKAGES.values() if not package.extra]
COMMANDS = """
import contextlib, io, json
for command in json.loads(sys.argv[1]):
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            from starflow.cli import main
            code = main(command)
        except SystemExit as exit:
            code = exit.code
    print(json.dumps([code, out.getvalue(), error.getvalue()]))
"""


def run(*commands: list[str], distributions: list[str]) -> list[tuple[int, str, str]]:
    """Return exit code, standard output and standard error of each command line."""
    done = python(COMMANDS, json.dumps(commands), distributions=distributions, modules=["starflow", "starflow_kernels"])
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_required_packages_are_enough(tmp_path):
    (tmp_path / "images" / "a").mkdir(parents=True)
    for name in range(4):
        Image.new("L", (8, 8)).save(tmp_path / "images" / "a" / f"{name}.png")
    (tmp_path / "tiny.yaml").write_text(
        "model: {image_size: 8, image_channels: 3, patch_size: 4, channels: 16, layers: [1], head_dim: 8}\n"
        f"data: {{source: folder, path: {tmp_path / 'images'}, size: 8}}\n"
        "training: {steps: 1, batch_size: 2}\n"
    )
    settings, pipeline = str(tmp_path / "tiny.yaml"), tmp_path / "pipeline"
    pipeline.mkdir()
    (pipeline / "model_index.json").write_text('{"_class_name": "TarFlowPipeline"}')
    good = [
        ["--help"],
        ["info", "--checkpoint", "digits"],
        ["train", "--config", settings, "--out", str(tmp_path / "run")],
        ["sample", "--num", "2", "--out", str(tmp_path / "drawn")],
        ["calibrate", "--out", str(tmp_path / "measured"), "--batch-size", "1", "--windows", "0"],
    ]
    bad = {
        "scikit-learn": ["train", "--preset", "digits", "--out", str(tmp_path / "digits")],
        "tensorboard": ["train", "--config", settings, "--out", str(tmp_path / "logged"), "--tensorboard"],
        "diffusers": ["sample", "--checkpoint", str(pipeline), "--out", str(tmp_path / "x")],
        "gradio": ["demo", "--port", "0"],
        "torch-fidelity": ["eval", "--fid", "--reference", str(tmp_path / "x.npz")],
        "emoji": [*good[2][:3], "--out", str(tmp_path / "x"), "--set", "data.source=emoji", "--set", "data.path=''"],
    }
    results = run(*good, *bad.values(), distributions=REQUIRED)
    for code, out, error in results[: len(good)]:
        assert code == 0 and out and not error, error
    for (code, out, error), name in zip(results[len(good) :], bad, strict=True):
        assert code == 2 and not out and error.startswith("starflow ") and error.count("\n") == 1, error
        extra = next(package.extra for package in PACKAGES.values() if package.name == name)
        assert name in error and "pip install" in error and f"starflow-kernels[{extra}]" in error


@pytest.mark.parametrize("package", ["safetensors", "PyYAML", "tqdm", "Pillow"])
def test_a_required_package_is_missing(package):
    others = [name for name in REQUIRED if name != package]
    shown, (code, out, error) = run(["--help"], ["train", "--help"], distributions=others)
    assert shown[0] == 0 and "commands:" in shown[1]
    expected = f"starflow: error: the package {package} is not installed: pip install {package}\n"
    assert (code, out, error) == (2, "", expected)


def test_public_names():
    assert set(dir(starflow)) == set(starflow.__all__)
    for name in starflow.__all__:
        if name not in starflow.MODULES[".pipelines"] or importlib.util.find_spec("diffusers"):
            assert getattr(starflow, name) is not None
    with pytest.raises(AttributeError, match="'starflow' has no attribute 'nothing'"):
        starflow.nothing  # noqa: B018


def test_other_missing_modules_are_not_ours():
    assert install_line("starflow.nothing") is None and install_line(None) is None


def test_extras_are_those_of_the_package():
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = {"": project["dependencies"], **project["optional-dependencies"]}
    for package in PACKAGES.values():
        assert any(line.startswith(package.name) for line in listed[package.extra]), package
