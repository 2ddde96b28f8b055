"""Training on several processes gives the losses of one, and survives signals, kills and other numbers of processes."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import kills, workers

from starflow import StarflowError
from starflow.cli import main
from starflow.training.checkpoints import hidden, latest, whole
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
    ("count", "data", "fsdp"),
    [(2, {}, {"accumulate": 2, "checkpoint_layers": True}), (4, {"accumulate": 2}, {"reshard_after_forward": False})],
)
def test_processes_together_train_as_one_does(alone, tmp_path, count, data, fsdp):
    commands = []
    for name, training in (("data", data), ("fsdp", {"parallel": "fsdp", **fsdp})):
        given = kills.write_settings(tmp_path / f"{name}.yaml", sample_every=8, **training)
        commands += [";", *given, "--out", str(tmp_path / name), "--json", str(tmp_path / f"{name}.json")]
    codes, texts = workers.run(tmp_path, count, *commands[1:])
    assert codes == [0] * count, texts
    assert not any(texts[1:])
    for name in ("data", "fsdp"):
        run, report = tmp_path / name, json.loads((tmp_path / f"{name}.json").read_text())["results"]
        check_same(alone, run)
        assert report["processes"] == count and report["rows_per_step"] == [32 // count] * count
        assert [path.name for path in (run / "samples").iterdir()] == ["0000008.png"]
        resumed, saved = FlowTrainer.resume(run), load_file(run / "model.safetensors")
        assert resumed.step == 8
        assert all(torch.equal(saved[name], resumed.average[f"model.{name}"]) for name in saved)


def test_a_killed_run_goes_on_with_other_numbers_of_processes(tmp_path):
    given = kills.write_settings(tmp_path / "run.yaml", steps=16, checkpoint_every=2, keep_checkpoints=2)
    FlowTrainer(FlowRunConfig.from_dict(kills.settings(steps=16)), tmp_path / "whole").run(quiet=True)
    kills.killed(tmp_path, tmp_path / "run", 2, 1, given, 0.2)
    check_same(tmp_path / "whole", tmp_path / "run")
    assert [path.name for path in whole(tmp_path / "run")] == ["0000014", "0000016"]


def test_processes_stop_together_after_a_signal_to_one(tmp_path):
    given = kills.write_settings(tmp_path / "run.yaml", steps=3000, checkpoint_every=1, parallel="fsdp")
    processes = workers.start(tmp_path, 2, *given, "--out", str(tmp_path / "run"))
    deadline = time.monotonic() + 120
    while latest(tmp_path / "run") is None and time.monotonic() < deadline:
        time.sleep(0.02)
    processes[1].terminate()
    for process in processes:
        process.join(60)
    texts = kills.texts(tmp_path, 2)
    assert [process.exitcode for process in processes] == [130, 130], texts
    step = int(latest(tmp_path / "run").name)
    assert 0 < step < 3000
    resume = f"continue with: starflow train --resume {tmp_path / 'run'}"
    assert texts == [f"stopped at step {step}; {resume}\n", ""]
    assert FlowTrainer.resume(tmp_path / "run").step == step


def test_processes_remove_the_weights_of_an_earlier_step(tmp_path, capsys):
    run = tmp_path / "run"
    trainer = FlowTrainer(FlowRunConfig.from_dict(kills.settings(steps=3000, checkpoint_every=2)), run)
    take = trainer.train_step

    def interrupted(*batch):
        if trainer.step == 1:
            raise KeyboardInterrupt
        return take(*batch)

    trainer.train_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.run(quiet=True)
    assert (run / "model.safetensors").exists()
    processes = workers.start(tmp_path, 2, "train", "--resume", str(run), "--quiet", "--threads", "1")
    deadline = time.monotonic() + 120
    while int(latest(run).name) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    processes[0].terminate()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [130, 130], kills.texts(tmp_path, 2)
    step = int(latest(run).name)
    assert main(["eval", "--checkpoint", str(run)]) == 2
    message = f"{run} is a run that has not written its weights: starflow export {run} --out FOLDER does"
    assert message in capsys.readouterr().err
    assert main(["export", str(run), "--out", str(tmp_path / "flow")]) == 0
    assert f"weights after {step} steps" in capsys.readouterr().out


def test_what_a_killed_process_left_is_no_checkpoint_and_goes_away(tmp_path):
    config = FlowRunConfig.from_dict(kills.settings(steps=2))
    left = hidden(tmp_path / "checkpoints" / "0000009")
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
    assert int(trainer.optimizer.state[next(trainer.flow.parameters())]["step"]) == 6
    assert FlowTrainer.resume(tmp_path).guards[0].state() == trainer.guards[0].state()


def test_a_spike_is_skipped_and_too_many_end_the_run(tmp_path, capsys):
    training = {"steps": 40, "spike_factor": 10.0, "max_skips": 2, "clip": 0.0}
    trainer = FlowTrainer(FlowRunConfig.from_dict(kills.settings(**training)), tmp_path / "one")
    spoil(trainer, (30,), 1e4)
    with pytest.warns(UserWarning, match=r"running average .* at step 30: the step is skipped"):
        trainer.run(quiet=True)
    assert trainer.metrics[-1]["skipped_steps"] == 1
    spoiled = FlowTrainer(FlowRunConfig.from_dict(kills.settings(**training)), tmp_path / "two")
    spoil(spoiled, tuple(range(30, 40)), 1e4)
    with (
        pytest.warns(UserWarning, match="at step 31"),
        pytest.raises(StarflowError, match="at step 32, after 2 skipped steps in a row: nothing was saved") as found,
    ):
        spoiled.run(quiet=True)
    assert str(found.value).endswith(
        "; begin a new run with a training.spike_factor above 10, or a lower training.learning_rate"
    )


def test_export_writes_the_weights_of_the_run(alone, tmp_path, capsys):
    assert main(["export", str(alone), "--out", str(tmp_path / "flow")]) == 0
    for name in ("model.safetensors", "config.json", "settings.yaml"):
        assert (tmp_path / "flow" / name).read_bytes() == (alone / name).read_bytes()
    assert main(["export", str(tmp_path / "flow"), "--out", str(tmp_path / "other")]) == 2
    assert "nothing to export: no checkpoint in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"accumulate": 3}, "training.batch_size=32: 1 process times training.accumulate=3 do not divide it"),
        (
            {"batch_size": 10000, "accumulate": 4},
            "training.batch_size=10000, cut to the 1437 images of the data: 1 process times training.accumulate=4 do",
        ),
    ],
)
def test_rows_that_cannot_be_divided_are_refused_with_the_numbers_of_the_settings(training, message, tmp_path, capsys):
    given = kills.write_settings(tmp_path / "run.yaml", **training)
    assert main([*given, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"starflow train: error: {message}") and len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["train-autoencoder", "train-pipeline"])
def test_other_trainers_refuse_several_processes(tmp_path, monkeypatch, capsys, command):
    pytest.importorskip("diffusers")
    path = tmp_path / "run.yaml"
    path.write_text("autoencoder: {channels: 1}\ndata: {}\ntraining: {steps: 1, batch_size: 8}\n")
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main([command, "--config", str(path), "--out", str(tmp_path / "run")]) == 2
    assert f"starflow {command} runs in one process: start it without torchrun" in capsys.readouterr().err
