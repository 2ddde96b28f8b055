"""Training: it learns, and a resumed run repeats an uninterrupted one, after a kill too."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from starflow import CheckpointError, ConfigError, DataError, StarflowError
from starflow.training.checkpoints import latest
from starflow.training.flow import FlowRunConfig, FlowTrainer, FlowTrainingConfig

MODEL = {
    "image_size": 8,
    "image_channels": 1,
    "patch_size": 2,
    "channels": 16,
    "layers": [1, 1],
    "head_dim": 8,
    "start": True,
    "num_classes": 10,
    "levels": 17,
}
TRAINING = {"steps": 8, "batch_size": 32, "learning_rate": 3e-3, "warmup_steps": 2, "ema": 0.9, "dropout": 0.1}


def settings(model=None, **training) -> FlowRunConfig:
    never = {"sample_every": 0, "checkpoint_every": 0, "log_every": 1}
    return FlowRunConfig.from_dict(
        {"model": {**MODEL, **(model or {})}, "data": {}, "training": {**TRAINING, **never, **training}}
    )


def train(config: FlowRunConfig, folder) -> FlowTrainer:
    trainer = FlowTrainer(config, folder)
    trainer.run(quiet=True)
    return trainer


def same(one, other) -> bool:
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_a_run_learns_and_writes_metrics_and_samples(tmp_path):
    trainer = train(settings(steps=60, sample_every=60, dropout=0.0), tmp_path)
    bits = [m["bits_per_dim"] for m in trainer.metrics]
    assert sum(bits[-5:]) / 5 < sum(bits[:5]) / 5 - 0.5
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert (tmp_path / "samples" / "0000060.png").exists() and (tmp_path / "settings.yaml").exists()


@pytest.mark.parametrize("model", [{}, {"scale": "unit"}])
def test_resume_repeats_an_uninterrupted_run(tmp_path, model):
    whole = train(settings(model), tmp_path / "whole")
    part = FlowTrainer(settings(model), tmp_path / "part")
    step = part.train_step

    def interrupted(*batch):
        if part.step == 5:
            raise KeyboardInterrupt
        return step(*batch)

    part.train_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        part.run(quiet=True)
    torch.manual_seed(1234)
    resumed = FlowTrainer.resume(tmp_path / "part")
    assert resumed.step == 5
    resumed.run(quiet=True)
    assert same(tmp_path / "whole", tmp_path / "part")
    assert resumed.metrics == whole.metrics


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_within_a_step_acts_after_it(tmp_path, number):
    # A process in the background may have been started with signals ignored.
    before = signal.signal(number, signal.default_int_handler)
    whole, part = train(settings(), tmp_path / "whole"), FlowTrainer(settings(), tmp_path / "part")
    part.optimizers[0].register_step_post_hook(lambda *_: signal.raise_signal(number) if part.step == 4 else None)
    with pytest.raises(KeyboardInterrupt):
        part.run(quiet=True)
    signal.signal(number, before)
    resumed = FlowTrainer.resume(tmp_path / "part")
    assert resumed.step == 5
    resumed.run(quiet=True)
    assert same(tmp_path / "whole", tmp_path / "part")
    assert resumed.metrics == whole.metrics


def test_a_killed_run_is_resumed_to_the_same_weights(tmp_path):
    config = settings(steps=40, checkpoint_every=5)
    train(config, tmp_path / "whole")
    code = (
        "import sys, json, torch; torch.set_num_threads(1)\n"
        "from starflow.training.flow import FlowRunConfig, FlowTrainer\n"
        "FlowTrainer(FlowRunConfig.from_dict(json.loads(sys.argv[1])), sys.argv[2]).run(quiet=True)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, json.dumps(config.to_dict()), str(tmp_path / "killed")])
    deadline = time.monotonic() + 120
    while latest(tmp_path / "killed") is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    resumed = FlowTrainer.resume(tmp_path / "killed")
    assert 0 < resumed.step < 40
    resumed.run(quiet=True)
    assert same(tmp_path / "whole", tmp_path / "killed")


def test_a_missing_or_damaged_checkpoint_is_not_resumed(tmp_path):
    with pytest.raises(CheckpointError, match="nothing to resume"):
        FlowTrainer.resume(tmp_path)
    train(settings(steps=1), tmp_path)
    for file in latest(tmp_path).iterdir():
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(CheckpointError, match="damaged"):
            FlowTrainer.resume(tmp_path)
        file.write_bytes(whole)
    assert FlowTrainer.resume(tmp_path).step == 1


def edit(run, change) -> None:
    """Change the progress in a checkpoint in place."""
    path = latest(run) / "run.json"
    progress = json.loads(path.read_text())
    change(progress)
    path.write_text(json.dumps(progress))


def test_a_run_whose_version_recorded_the_data_in_another_way_is_refused_as_such(tmp_path, monkeypatch):
    monkeypatch.setattr("starflow.training.loop.data_state", lambda config: {"images": 3, "digest": "abc"})
    train(settings(steps=1), tmp_path)
    assert FlowTrainer.resume(tmp_path).step == 1
    edit(tmp_path, lambda state: state.update(data={"images": 3}))
    with pytest.raises(
        CheckpointError, match="another version of this package wrote it and recorded the data"
    ) as error:
        FlowTrainer.resume(tmp_path)
    assert "damaged" not in str(error.value)


def test_a_run_whose_data_are_gone_names_their_place_and_no_flag(tmp_path):
    train(settings(steps=1), tmp_path)
    edit(tmp_path, lambda state: state["config"]["data"].update(source="folder", path=str(tmp_path / "gone")))
    with pytest.raises(DataError, match=f"^the data of this run are not at {tmp_path}/gone: ") as error:
        FlowTrainer.resume(tmp_path)
    assert "--" not in str(error.value).replace(str(tmp_path), "")


@pytest.fixture(scope="module")
def usual_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("usual")
    train(settings(steps=4, sample_every=2, workers=1), folder)
    return folder


def test_defaults_of_torch_do_not_change_a_run(usual_run, hostile, tmp_path):
    hostile()
    train(settings(steps=4, sample_every=2, workers=1), tmp_path)
    assert same(usual_run, tmp_path)
    for image in ("0000002.png", "0000004.png"):
        assert (tmp_path / "samples" / image).read_bytes() == (usual_run / "samples" / image).read_bytes()


def test_a_batch_beyond_the_data_is_named_and_cut(tmp_path):
    with pytest.warns(UserWarning, match=r"^training\.batch_size=2048 exceeds the 1437 images of the data"):
        assert FlowTrainer(settings(batch_size=2048), tmp_path).rows == slice(0, 1437)


def test_divergence_stops_the_run(tmp_path):
    trainer = FlowTrainer(settings(max_skips=2), tmp_path)
    next(trainer.flow.parameters()).data.fill_(float("nan"))
    with (
        pytest.warns(UserWarning, match="the loss is nan at step 1: the step is skipped"),
        pytest.raises(StarflowError, match="the loss is nan at step 2, after 2 skipped steps in a row") as found,
    ):
        trainer.run(quiet=True)
    assert str(found.value).endswith("; begin a new run with a lower training.learning_rate")
    assert not (tmp_path / "model.safetensors").exists()


def test_bf16_autocast_trains(tmp_path):
    trainer = train(settings(steps=30, bf16=True, dropout=0.0), tmp_path)
    assert trainer.metrics[-1]["bits_per_dim"] < trainer.metrics[0]["bits_per_dim"]


def test_the_learning_rate_rises_linearly_and_falls_along_a_cosine():
    config = FlowTrainingConfig(steps=110, batch_size=1, learning_rate=1.0, min_learning_rate=0.1, warmup_steps=10)
    assert config.learning_rate_at(0) == pytest.approx(0.1)
    assert config.learning_rate_at(9) == 1.0
    assert config.learning_rate_at(60) == pytest.approx(0.55)
    assert config.learning_rate_at(110) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("training", {"learning_rat": 1}, "unknown FlowTrainingConfig settings learning_rat"),
        ("training", {"steps": 0}, "steps=0"),
        ("training", {"steps": 1.5}, "steps=1.5"),
        ("training", {"bf16": 1}, "bf16=1"),
        ("training", {"dropout": 1.0}, "dropout=1.0"),
        ("data", {"source": "mnist"}, "mnist"),
        ("model", {"image_size": 16}, "image_size=16"),
    ],
)
def test_wrong_settings_are_named(section, change, message):
    with pytest.raises(ConfigError, match=message):
        config = {"model": dict(MODEL), "data": {}, "training": dict(TRAINING)}
        config[section].update(change)
        FlowRunConfig.from_dict(config)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"levels": 256}, "levels=256"),
        ({"num_classes": 4}, "num_classes=4"),
        ({"image_channels": 3}, "image_channels=3"),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_refused(tmp_path, model, message):
    with pytest.raises(ConfigError, match=message):
        FlowTrainer(settings(model), tmp_path)


def test_an_error_of_the_data_is_not_taken_for_a_damaged_checkpoint(tmp_path, monkeypatch):
    run = tmp_path / "run"
    train(settings(steps=1), run)

    def load(config):
        raise TypeError("mine")

    monkeypatch.setattr("starflow.training.loop.load", load)
    with pytest.raises(TypeError, match="mine"):
        FlowTrainer.resume(run)
