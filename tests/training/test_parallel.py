"""Training on several processes gives the losses of one, and survives signals, kills and other numbers of processes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import kills, workers

from starflow.cli import main
from starflow.training.checkpoints import PART, latest, whole
from starflow.training.flow import FlowRunConfig, FlowTrainer

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """Run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    FlowTrainer(FlowRunConfig.from_dict(kills.settings()), folder).run(quiet=True)
    return folder


def check_same(run: Path, other: Path) -> None:
    """Check that two runs have the same losses and weights."""
    assert kills.difference(run, other) < TOLERANCE
    one, two = (load_file(folder / "model.safetensors") for folder in (run, other))
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)


@pytest.mark.parametrize(
    ("count", "training"),
    [
        (2, {}),
        (2, {"parallel": "fsdp", "accumulate": 2, "checkpoint_layers": True}),
        (4, {"accumulate": 2}),
        (4, {"parallel": "fsdp", "reshard_after_forward": False}),
    ],
)
def test_processes_together_train_as_one_does(alone, tmp_path, count, training):
    given = kills.write_settings(tmp_path / "run.yaml", sample_every=12, **training)
    codes, texts = workers.run(
        tmp_path, count, *given, "--out", str(tmp_path / "run"), "--json", str(tmp_path / "run.json")
    )
    assert codes == [0] * count, texts
    check_same(alone, tmp_path / "run")
    assert not any(texts[1:])
    found = json.loads((tmp_path / "run.json").read_text())["results"]
    assert found["processes"] == count and found["rows_per_step"] == [32 // count] * count
    assert [path.name for path in (tmp_path / "run" / "samples").iterdir()] == ["0000012.png"]
    resumed = FlowTrainer.resume(tmp_path / "run")
    assert resumed.step == 12
    before = load_file(tmp_path / "run" / "model.safetensors")
    averages = {name.removeprefix("model."): tensor for name, tensor in resumed.average.items()}
    assert all(torch.equal(before[name], averages[name]) for name in before)


def test_a_killed_run_goes_on_with_other_numbers_of_processes(tmp_path):
    given = kills.write_settings(tmp_path / "run.yaml", steps=24, checkpoint_every=2, keep_checkpoints=2)
    FlowTrainer(FlowRunConfig.from_dict(kills.settings(steps=24)), tmp_path / "whole").run(quiet=True)
    kills.killed(tmp_path, tmp_path / "run", 2, 1, given, 0.2)
    check_same(tmp_path / "whole", tmp_path / "run")
    assert [path.name for path in whole(tmp_path / "run")] == ["0000022", "0000024"]


def test_sigterm_under_torchrun_saves_a_step_that_all_processes_have_taken(tmp_path):
    steps = 3000
    given = kills.write_settings(tmp_path / "run.yaml", steps=steps, checkpoint_every=1, parallel="fsdp")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "starflow"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with open(tmp_path / "text", "w") as file:
        child = subprocess.Popen(
            [*command, *given, "--out", "run"], stdout=file, stderr=file, cwd=tmp_path, env=environment
        )
    deadline = time.monotonic() + 120
    while latest(tmp_path / "run") is None and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.02)
    child.terminate()
    child.wait(60)
    text = (tmp_path / "text").read_text()
    step = int(latest(tmp_path / "run").name)
    assert f"stopped at step {step}; continue with: starflow train --resume run" in text
    assert 0 < step < steps and text.count("stopped at") == 1
    assert FlowTrainer.resume(tmp_path / "run").step == step


def test_what_a_killed_process_left_is_no_checkpoint_and_goes_away(tmp_path):
    config = FlowRunConfig.from_dict(kills.settings(steps=2))
    left = tmp_path / "checkpoints" / PART.format("0000009")
    left.mkdir(parents=True)
    (left / ".metadata").write_bytes(b"half")
    assert latest(tmp_path) is None
    FlowTrainer(config, tmp_path).run(quiet=True)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["0000002"]


@pytest.mark.parametrize("training", [{"accumulate": 4}, {"checkpoint_layers": True}, {"compile": True}])
def test_ways_to_save_memory_or_time_change_no_loss(alone, tmp_path, training):
    FlowTrainer(FlowRunConfig.from_dict(kills.settings(**training)), tmp_path).run(quiet=True)
    check_same(alone, tmp_path)


def test_recomputed_layers_keep_less(tmp_path):
    kept = []
    for recomputes in (False, True):
        config = FlowRunConfig.from_dict(kills.settings(checkpoint_layers=recomputes))
        trainer = FlowTrainer(config, tmp_path / str(recomputes))
        sizes = []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            trainer.flow(torch.rand(8, 1, 8, 8), torch.arange(8))
        kept.append(sum(sizes))
    assert kept[1] < 0.8 * kept[0]


def spoil(trainer: FlowTrainer, steps: tuple[int, ...], factor: float) -> None:
    """Multiply the loss of some steps."""
    loss = trainer.flow.loss
    trainer.flow.loss = lambda *arguments: loss(*arguments) * (factor if trainer.step in steps else 1.0)


def test_a_step_whose_loss_is_not_finite_is_skipped_and_counted(tmp_path):
    trainer = FlowTrainer(FlowRunConfig.from_dict(kills.settings()), tmp_path)
    spoil(trainer, (3, 4), float("nan"))
    with pytest.warns(UserWarning, match="the loss is nan at step 3: the step is skipped"):
        trainer.run(quiet=True)
    assert [m["skipped_steps"] for m in trainer.metrics[2:6]] == [0, 1, 2, 2]
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "model.safetensors").values())
    assert int(trainer.optimizer.state[next(trainer.flow.parameters())]["step"]) == 10
    assert FlowTrainer.resume(tmp_path).guards[0].state() == trainer.guards[0].state()


def test_a_spike_is_skipped_and_too_many_end_the_run(tmp_path, capsys):
    training = {"steps": 40, "spike_factor": 10.0, "max_skips": 2, "clip": 0.0}
    trainer = FlowTrainer(FlowRunConfig.from_dict(kills.settings(**training)), tmp_path / "one")
    spoil(trainer, (30,), 1e4)
    with pytest.warns(UserWarning, match="running average .* at step 30: the step is skipped"):
        trainer.run(quiet=True)
    assert trainer.metrics[-1]["skipped_steps"] == 1
    spoiled = FlowTrainer(FlowRunConfig.from_dict(kills.settings(**training)), tmp_path / "two")
    spoil(spoiled, tuple(range(30, 40)), 1e4)
    with (
        pytest.warns(UserWarning, match="at step 31"),
        pytest.raises(Exception, match="at step 32, after 2 skipped steps in a row: nothing was saved since"),
    ):
        spoiled.run(quiet=True)


def test_export_writes_the_weights_of_the_run(alone, tmp_path, capsys):
    assert main(["export", str(alone), "--out", str(tmp_path / "flow")]) == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "flow" / name).read_bytes() == (alone / name).read_bytes()
    assert main(["export", str(tmp_path / "flow"), "--out", str(tmp_path / "other")]) == 2
    assert "nothing to resume: no checkpoint in" in capsys.readouterr().err


def test_rows_that_cannot_be_divided_are_refused(tmp_path, capsys):
    given = kills.write_settings(tmp_path / "run.yaml", accumulate=3)
    assert main([*given, "--out", str(tmp_path / "run")]) == 2
    assert "a batch of 32 rows: 1 process times accumulate=3 do not divide it" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
