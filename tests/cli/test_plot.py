"""`starflow plot`: one picture with the metrics and the samples of a run."""

import json
import sys

import pytest
from PIL import Image
from support.commands import fails

from starflow.cli import main
from starflow.cli.plot import sample_grids


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    (folder / "samples").mkdir(parents=True)
    rows = [
        {"step": step, "loss": 1 / step, "bits_per_dim": 3.0, "gradient_norm": 0.1 * step, "learning_rate": 1e-3}
        for step in range(1, 9)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in range(1, 8):
        Image.new("RGB", (20, 10), (30 * step, 0, 0)).save(folder / "samples" / f"{step:07d}.png")
    return folder


def colors(path) -> set[tuple[int, int, int]]:
    with Image.open(path) as image:
        return {color for _, color in image.convert("RGB").getcolors(image.width * image.height)}


def test_curves_and_samples_are_in_one_picture(run, capsys):
    pytest.importorskip("matplotlib")
    assert main(["plot", str(run), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert results["curves"] == ["loss", "bits_per_dim", "gradient_norm", "learning_rate"] and results["entries"] == 8
    found = colors(run / "plot.png")
    assert {(30 * step, 0, 0) for step in (1, 3, 5, 7)} <= found and (60, 0, 0) not in found


def test_a_run_without_samples_has_its_curves_alone(run, tmp_path):
    pytest.importorskip("matplotlib")
    (run / "metrics.jsonl").write_text('{"step": 1, "reconstruction": 0.5, "gradient_norm": 0.0}\n')
    for path in (run / "samples").iterdir():
        path.unlink()
    assert main(["plot", str(run), "--out", str(tmp_path / "x" / "y.png")]) == 0
    with Image.open(tmp_path / "x" / "y.png") as image:
        assert image.width == 2 * image.height


def test_the_first_and_the_last_grid_are_shown(run):
    assert [int(path.stem) for path in sample_grids(run)] == [1, 3, 5, 7]
    for step in (2, 4, 5, 6, 7):
        (run / "samples" / f"{step:07d}.png").unlink()
    assert [int(path.stem) for path in sample_grids(run)] == [1, 3]


def test_runs_without_metrics_and_wrong_names_are_named(run, capsys, monkeypatch):
    assert "expected a name that ends with .png" in fails(capsys, "plot", str(run), "--out", "x.pdf")
    assert "no nowhere/metrics.jsonl" in fails(capsys, "plot", "nowhere")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "starflow-kernels[plot]" in fails(capsys, "plot", str(run))
    for text in ("{}", '{"step": 1}', "5"):
        (run / "metrics.jsonl").write_text(f"{text}\n")
        assert "no metrics in it" in fails(capsys, "plot", str(run))
    for text in ('{"step": 2, "loss": null}', '{"step": 2, "gradient_norm": "x"}', '{"loss": 1.0}', "[2]"):
        (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n' + f"{text}\n")
        assert "entry 2 is no mapping of a step and metrics to numbers" in fails(capsys, "plot", str(run))
    (run / "metrics.jsonl").unlink()
    assert "of a pipeline, name a stage" in fails(capsys, "plot", str(run))
