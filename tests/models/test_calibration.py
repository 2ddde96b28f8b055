"""Calibration: which solver is chosen, what is stored, when it is used, and what `starflow calibrate` says."""

import dataclasses
import json
import os

import pytest
import torch

from starflow import CheckpointError, ConfigError, Flow, FlowConfig, Guidance
from starflow.cli import main
from starflow.inversion import measure as measuring
from starflow.inversion.measure import calibrate
from starflow.inversion.request import TOLERANCE, Inversion
from starflow.models.calibration import (
    SOLVERS,
    BlockMeasurement,
    Calibration,
    Conditions,
    Measurement,
    Trial,
    read_calibration,
)
from starflow_kernels import Solver

FIELDS = {
    "image_size": 8, "image_channels": 1, "patch_size": 2, "channels": 16, "layers": (1, 1), "head_dim": 8,
    "num_classes": 3,
}  # fmt: skip
ROTARY = {"rotary": "interleaved", "start": True, "scale": "softplus", "condition_blocks": "last"}


def make(**changes) -> Flow:
    """A flow of 16 tokens in two blocks with every weight random and tame heads."""
    torch.manual_seed(0)
    flow = Flow(FlowConfig(**{**FIELDS, **changes})).eval()
    for name, parameter in flow.named_parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.04 if "proj_out" in name else 0.15)
    return flow


def measured(flow: Flow, batch_size: int = 4, chosen: int = 1, **conditions) -> Measurement:
    """As if the solver of that index had been the fastest for the first block, sequential for the other."""
    guidance = Guidance(conditions.pop("guidance", 0.0), conditions.pop("rule", "tarflow"))
    found = Conditions.of(flow, batch_size, guidance, conditions.pop("tol", TOLERANCE))
    trials = (
        Trial("sequential", 0, (), 0.2, 15, 60, 0.0),
        Trial("jacobi", 4, (1, 4), 0.1, 9, 80, 1e-7),
        Trial("jacobi", 0),
    )
    blocks = BlockMeasurement(trials, chosen), BlockMeasurement(trials, 0)
    return Measurement(dataclasses.replace(found, **conditions), "a machine", blocks)


def calibrated(*measurements: Measurement, **changes) -> Flow:
    flow = make(**changes)
    flow.calibration = Calibration(flow.config.grid, flow.config.token_dim, measurements or (measured(flow),))
    return flow


class Stopwatch:
    """Takes the place of the clock: seconds of a solver by (method, window, neighbours), and jitter by round."""

    def __init__(self, monkeypatch, seconds: dict, error: dict | None = None):
        self.seconds, self.error, self.calls = seconds, error or {}, []
        monkeypatch.setattr(measuring._Race, "_time", lambda race, *arguments: self.time(race, *arguments))

    def time(self, race, solver: Solver, draw: int, limit: float = float("inf")):
        z, context, options = race.draws[draw]
        found = race.block.inverse(z, *context, solver=solver, **options)
        x, report = found.x, found.report
        key = solver.method, solver.window, bool(solver.neighbours)
        self.calls.append(key)
        seconds = self.seconds.get(key, 9.0)
        seconds = seconds(self.calls.count(key)) if callable(seconds) else seconds
        if seconds > limit:
            raise measuring.GivenUp
        return seconds, x + self.error.get(key, 0.0), report


SEQUENTIAL, WINDOW, NEAR = ("sequential", 0, False), ("jacobi", 8, False), ("jacobi", 8, True)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({SEQUENTIAL: 1.0}, SEQUENTIAL),
        ({SEQUENTIAL: 1.0, WINDOW: 0.9}, WINDOW),
        ({SEQUENTIAL: 1.0, WINDOW: 0.9, NEAR: 0.8}, NEAR),
        ({SEQUENTIAL: 1.0, WINDOW: 0.97, NEAR: 1.5}, SEQUENTIAL),
        # Fast at first and never again; fast until it must win once more.
        ({SEQUENTIAL: 1.0, WINDOW: lambda calls: 0.5 if calls <= 3 else 1.1}, SEQUENTIAL),
        ({SEQUENTIAL: 0.05, WINDOW: lambda calls: 0.02 if calls <= 6 else 0.06}, SEQUENTIAL),
    ],
)
def test_a_solver_is_chosen_where_it_wins_again_and_again(monkeypatch, seconds, expected):
    Stopwatch(monkeypatch, seconds)
    told = []
    found = calibrate(make(), 2, windows=(8, 0, 64), on_block=lambda block, measured: told.append((block, measured)))
    assert [block for block, _ in told] == [1, 0] and [block for _, block in told[::-1]] == list(found.blocks)
    for block in found.blocks:
        choice = block.choice
        assert (choice.method, choice.window, bool(choice.neighbours)) == expected
        assert [str(trial) for trial in block.trials] == [
            "sequential", "jacobi, window 8", "quasi-Newton, window 8", "jacobi, all tokens",
            "quasi-Newton, all tokens",
        ]  # fmt: skip
        assert block.trials[-1].seconds is None and block.trials[0].seconds == seconds[SEQUENTIAL]
    assert found.sequential_seconds == 2 * seconds[SEQUENTIAL] and found.seconds <= found.sequential_seconds


def test_larger_windows_are_left_out_once_they_are_slower(monkeypatch):
    fast, slow = ("jacobi", 4, True), ("jacobi", 8, True)
    Stopwatch(monkeypatch, {SEQUENTIAL: 1.0, ("jacobi", 2, True): 0.7, fast: 0.5, slow: 0.8})
    found = calibrate(make(), 2, windows=(0, 8, 4, 2))
    assert [trial.window for trial in found.blocks[0].trials] == [0, 2, 2, 4, 4, 8, 8]
    assert found.blocks[0].choice.window == 4


def test_a_wrong_result_is_never_chosen(monkeypatch):
    Stopwatch(monkeypatch, {SEQUENTIAL: 1.0, WINDOW: 0.1, NEAR: 0.5}, {WINDOW: 1e-3})
    found = calibrate(make(), 2, windows=(8,))
    assert {str(block.choice) for block in found.blocks} == {"quasi-Newton, window 8"}
    assert found.blocks[0].trials[1].error >= 9e-4
    found = calibrate(make(), 2, tol=1e-2, windows=(8,))
    assert {str(block.choice) for block in found.blocks} == {"jacobi, window 8"}


def test_a_measurement_prints_as_text(monkeypatch):
    Stopwatch(monkeypatch, {SEQUENTIAL: 1.0, NEAR: 0.1, WINDOW: 2.0}, {NEAR: 1e-3})
    found = calibrate(make(), 2, windows=(8,))
    assert str(found) == "batch 2: 2 s sequential, 2 s as chosen, speedup 1.00"
    passes = [trial.passes for trial in found.blocks[0].trials]
    assert str(found.blocks[0]) == (
        f"sequential, 1 s, {passes[0]} passes; not chosen: quasi-Newton, window 8, 100 ms, {passes[2]} passes, "
        "error 1.0e-03"
    )


def test_a_flow_keeps_its_measurements(monkeypatch):
    Stopwatch(monkeypatch, {SEQUENTIAL: 1.0, NEAR: 0.5})
    flow = make()
    measured = [flow.calibrate(batch_size, windows=(8,)) for batch_size in (2, 9)]
    assert flow.calibration.measurements == tuple(measured) and flow.calibration.grid == flow.config.grid
    flow.calibrate(2, windows=(8,))
    assert [m.conditions.batch_size for m in flow.calibration.measurements] == [9, 2]


def test_a_hopeless_solver_is_given_up(monkeypatch):
    flow = make()
    race = measuring._Race(flow, 0, Guidance(), [measuring._draw(flow, 2, Guidance(), None, None, 0, 0)])
    with pytest.raises(measuring.GivenUp):
        race._time(Solver("jacobi", window=4), 0, limit=0.0)


def test_text_and_guidance():
    flow = make(**ROTARY, num_classes=0, text_dim=5, text_len=3)
    text, empty = torch.randn(2, 3, 5), torch.zeros(1, 3, 5)
    found = calibrate(flow, 3, Guidance(2.0, "starflow"), windows=(4,), text=text, empty_text=empty)
    assert found.conditions.guidance == 2 and found.conditions.rule == "starflow"
    with pytest.raises(ConfigError, match="states of prompts"):
        calibrate(flow, 1)
    with pytest.raises(ConfigError, match="attention temperature"):
        calibrate(make(), 1, Guidance(1.0, temperature=2.0))


def test_auto_is_used_for_what_was_measured():
    flow = calibrated()
    z, chosen = flow.noise(4), "jacobi"

    def methods(inversion=Inversion(), z=z, guidance=Guidance(), flow=flow):
        return [solver.method for solver in inversion.solvers(flow, z, guidance)]

    assert methods() == [chosen, "sequential"]
    assert methods(z=flow.noise(2)) == methods(z=flow.noise(8)) == [chosen, "sequential"]
    plain = ["sequential"] * 2
    assert methods(z=flow.noise(1)) == methods(z=flow.noise(9)) == plain
    assert methods(guidance=Guidance(1.0)) == plain and methods(flow=make()) == plain
    assert methods(Inversion("sequential")) == plain and methods(Inversion("jacobi")) == ["jacobi"] * 2
    # A looser tolerance takes no more passes; a tighter one may.
    assert methods(Inversion(tol=1e-3)) == [chosen, "sequential"] and methods(Inversion(tol=TOLERANCE / 2)) == plain
    assert Inversion(tol=1e-3).solvers(flow, z, Guidance())[0].tol == 1e-3
    for conditions in ({"threads": 64}, {"device": "cuda"}, {"dtype": "bfloat16"}):
        assert methods(flow=calibrated(measured(flow, **conditions))) == plain
    guided = calibrated(measured(flow, guidance=1.5))
    assert methods(flow=guided) == plain and methods(flow=guided, guidance=Guidance(2.0)) == [chosen, "sequential"]
    for guidance in (Guidance(4.0), Guidance(2.0, "starflow"), Guidance(2.0, annealed=True)):
        assert methods(flow=guided, guidance=guidance) == plain
    assert methods(flow=guided, guidance=Guidance(2.0, temperature=1.5)) == plain
    wide = calibrated(**ROTARY)
    assert methods(flow=wide) == [chosen, "sequential"]
    assert methods(flow=wide, z=torch.randn(4, 1, 8, 12)) == plain


def test_the_nearest_batch_size_counts():
    flow = make()
    flow = calibrated(measured(flow, 4, 1), measured(flow, 6, 0))
    assert flow.calibration.find(Conditions.of(flow, 5, Guidance())).conditions.batch_size == 6
    assert flow.calibration.find(Conditions.of(flow, 4, Guidance())).conditions.batch_size == 4
    again = flow.calibration.add(measured(flow, 4, 0))
    assert len(again.measurements) == 2 and again.measurements[-1].blocks[0].chosen == 0


def test_jacobi_takes_the_nearest_tokens():
    flow = make(**ROTARY)
    for z, expected in ((flow.noise(1), (1, 4)), (torch.randn(1, 1, 4, 12), (1, 6)), (torch.randn(1, 1, 8, 2), (1,))):
        solvers = Inversion("jacobi", tol=1e-6).solvers(flow, z, Guidance(1.0, temperature=2.0))
        assert solvers == [Solver("jacobi", tol=1e-6, neighbours=expected)] * 2
        assert Inversion("jacobi", 4).solvers(flow, z, Guidance())[0] == Solver("jacobi", 4, neighbours=(1,))


@pytest.mark.parametrize("guidance", [Guidance(), Guidance(1.5), Guidance(1.5, "starflow", annealed=True)])
def test_samples_of_every_method_agree(guidance):
    flow = make()
    conditions = dataclasses.replace(Conditions.of(flow, 4, guidance), tol=0.0)
    flow = calibrated(dataclasses.replace(measured(flow), conditions=conditions))
    z, labels = flow.noise(4), torch.tensor([0, 1, 2, -1])
    expected = flow.inverse(z, labels, guidance=guidance).x
    for inversion in (Inversion(), Inversion("jacobi"), Inversion("jacobi", 3, 0.0)):
        solvers = inversion.solvers(flow, z, guidance)
        assert solvers[0].method == "jacobi" and solvers[0].neighbours[0] == 1
        x = flow.inverse(z, labels, guidance=guidance, solvers=solvers).x
        assert (x - expected).abs().max() <= 1e-4
    seen = []
    labels = torch.arange(10) % 3
    images, report = flow.sample(
        10, labels, guidance=guidance, batch_size=4, certify=True, progress=lambda *n: seen.append(n)
    )
    assert report.method == "jacobi" and report.certificate < 1e-4 and seen[-1] == (320, 320) and seen == sorted(seen)
    assert [block.samples for block in report.blocks] == [10, 10] and report.blocks[1].method == "sequential"
    assert report.steps == sum(block.passes for block in report.blocks)
    plain = flow.sample(10, labels, guidance=guidance, batch_size=4, inversion=Inversion("sequential"))
    assert (images.int() - plain.images.int()).abs().max() <= 1 and plain.report.method == "sequential"


def test_a_calibration_stays_with_its_weights(tmp_path):
    flow = calibrated()
    flow.save_pretrained(tmp_path)
    again = Flow.from_pretrained(tmp_path)
    assert again.calibration == flow.calibration and again.state_dict().keys() == make().state_dict().keys()
    again.save_pretrained(tmp_path / "copy")
    assert Flow.from_pretrained(tmp_path / "copy").calibration == flow.calibration
    # Other weights in the same folder have none.
    make().save_pretrained(tmp_path)
    assert Flow.from_pretrained(tmp_path).calibration is None
    assert not (tmp_path / SOLVERS).exists()


def test_a_calibration_stays_with_a_pipeline(tmp_path):
    pytest.importorskip("diffusers")
    from starflow.pipelines import FlowModel, FlowPipeline, TarFlowPipeline

    flow = calibrated()
    pipe = TarFlowPipeline(FlowModel.from_flow(flow))
    pipe.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 2
    again = FlowPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.transformer.calibration == flow.calibration
    report = again([0, 1, 2, 0], certify=True).report
    assert report.method == "jacobi" and report.blocks[0].neighbours and report.certificate < 1e-4
    report = again(0, method="jacobi", window=5, tol=0.0).report
    assert {block.window for block in report.blocks} == {5}
    model = FlowModel.from_pretrained(tmp_path, subfolder="transformer")
    assert model.calibration == flow.calibration
    (tmp_path / "transformer" / SOLVERS).write_text("{")
    with pytest.raises(CheckpointError, match="not a calibration"):
        FlowPipeline.from_pretrained(tmp_path)


def test_files_that_do_not_fit(tmp_path):
    flow = calibrated()
    flow.save_pretrained(tmp_path)
    settings = (tmp_path / SOLVERS).read_text()

    def problem(change=None, config=flow.config) -> str:
        changed = json.loads(settings)
        if change:
            change(changed, changed["measurements"][0], changed["measurements"][0]["blocks"][0])
        (tmp_path / SOLVERS).write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match="delete it and calibrate again") as error:
            read_calibration(tmp_path, config)
        assert str(tmp_path / SOLVERS) in str(error.value) and "\n" not in str(error.value)
        return str(error.value)

    assert "version 2" in problem(lambda s, m, b: s.update(version=2))
    assert "'grid' is missing" in problem(lambda s, m, b: s.pop("grid"))
    assert "chooses 7 of 3" in problem(lambda s, m, b: b.update(chosen=7))
    assert "no time" in problem(lambda s, m, b: b.update(chosen=2))
    assert "no time" in problem(lambda s, m, b: b["trials"].pop(0))
    assert "method='magic'" in problem(lambda s, m, b: b["trials"][1].update(method="magic"))
    assert "window=-4" in problem(lambda s, m, b: b["trials"][1].update(window=-4))
    assert "neighbours=(4, 1)" in problem(lambda s, m, b: b["trials"][1].update(neighbours=[4, 1]))
    assert "speed" in problem(lambda s, m, b: b["trials"][0].update(speed=1))
    assert "batch_size 0" in problem(lambda s, m, b: m["conditions"].update(batch_size=0))
    assert "tol=-1" in problem(lambda s, m, b: m["conditions"].update(tol=-1))
    assert "another flow" in problem(lambda s, m, b: m["blocks"].pop())
    assert "another flow" in problem(config=make(layers=(1, 1, 1)).config)
    assert "another flow" in problem(config=make(image_size=12).config)
    for text in (settings[: len(settings) // 2], "[]", "\0"):
        (tmp_path / SOLVERS).write_text(text)
        with pytest.raises(CheckpointError, match="not a calibration"):
            Flow.from_pretrained(tmp_path)


def test_the_command(tmp_path, monkeypatch, capsys):
    Stopwatch(monkeypatch, {SEQUENTIAL: 1.0, NEAR: 0.5})
    folder, report = tmp_path / "run", tmp_path / "report.json"
    make().save_pretrained(folder)
    command = ["calibrate", "--checkpoint", str(folder), "--windows", "8", "--verbose", "--json", str(report)]
    assert main([*command, "--batch-size", "2", "1"]) == 0
    printed = capsys.readouterr().out
    first = "batch 1: 2 s sequential, 1 s as chosen, speedup 2.00\n"
    assert f"{first}  block 1: quasi-Newton, window 8, 500 ms" in printed
    assert "A parallel solver is chosen if it is 5% faster in repeated measurements" in printed
    results = json.loads(report.read_text())["results"]
    assert [m["batch_size"] for m in results["measurements"]] == [1, 2]
    assert results["measurements"][0]["blocks"][0]["choice"] == "quasi-Newton, window 8"
    # What was there of other conditions stays.
    assert main([*command, "--batch-size", "2", "--guidance", "1.5", "--tol", "1e-4"]) == 0
    conditions = [m.conditions for m in Flow.from_pretrained(folder).calibration.measurements]
    assert [(c.batch_size, c.guidance, c.tol) for c in conditions] == [
        (1, 0, TOLERANCE),
        (2, 0, TOLERANCE),
        (2, 1.5, 1e-4),
    ]
    capsys.readouterr()
    assert main(["info", "--checkpoint", str(folder)]) == 0
    assert "1 s, sequential 2 s, on " in capsys.readouterr().out
    assert main(["info", "--checkpoint", str(folder), "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)["results"]["calibration"]
    assert measured[0]["solvers"] == ["quasi-Newton, window 8"] * 2
    drawn = ["sample", "--checkpoint", str(folder), "--num", "2", "--out", str(tmp_path / "drawn"), "--certify"]
    assert main([*drawn, "--guidance", "2", "--tol", "1e-4", "--verbose"]) == 0
    assert "block 1: quasi-Newton, window 8: " in capsys.readouterr().out
    (folder / "checkpoints").mkdir()
    assert main(["calibrate", "--checkpoint", str(folder), "--batch-size", "1", "--out", str(tmp_path / "copy")]) == 0
    assert len(Flow.from_pretrained(tmp_path / "copy").calibration.measurements) == 3
    assert len(list(tmp_path.glob("copy/*"))) == 3
    capsys.readouterr()
    (folder / SOLVERS).write_text("{")
    assert main(drawn) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("starflow sample: error: ") and "delete it and calibrate again" in error
    assert "\n" not in error


def test_the_command_on_a_pipeline(tmp_path, monkeypatch, capsys):
    pytest.importorskip("diffusers")
    from support import components

    Stopwatch(monkeypatch, {SEQUENTIAL: 1.0, WINDOW: 0.5})
    folder = str(components.save(tmp_path / "model"))
    arguments = ["--windows", "8", "--batch-size", "2", "--guidance", "3.6", "--prompt", "a cat", "three dog"]
    assert main(["calibrate", "--checkpoint", folder, *arguments]) == 0
    capsys.readouterr()
    drawn = ["sample", "--checkpoint", folder, "--prompt", "a cat", "--num", "2", "--out", str(tmp_path / "drawn")]
    assert main([*drawn, "--certify", "--json", "-"]) == 0
    printed = capsys.readouterr().out
    results = json.loads(printed[printed.index("{\n") :])["results"]
    assert results["method"] == "jacobi" and results["blocks"][2]["window"] == 8 and results["certificate"] < 1e-4


def test_where_nothing_can_be_written(tmp_path, capsys, monkeypatch):
    make().save_pretrained(tmp_path / "run")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert main(["calibrate", "--checkpoint", str(tmp_path / "run")]) == 2
    assert f"--out FOLDER: {tmp_path / 'run'} cannot be written to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: expected an integer of at least 1"),
        ({"batch_size": 1.5}, "batch_size=1.5: expected an integer"),
        ({"batch_size": True}, "batch_size=True: expected an integer"),
        ({"windows": [0, -3]}, "windows=-3: expected an integer of at least 0"),
        ({"windows": ["a"]}, "windows='a': expected an integer"),
        ({"tol": -1.0}, "tol=-1.0"),
        ({"seed": -1}, "seed=-1: expected an integer from 0"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ConfigError, match=message):
        Flow.from_pretrained("digits").calibrate(**{"batch_size": 1, **options})
