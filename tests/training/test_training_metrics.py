"""Metrics of training: the terms of the loss by block, speed and memory, and where they are logged."""

import json
import subprocess
import sys
import types

import pytest
import torch
from support.commands import fails

from starflow import Flow, StarflowError
from starflow.cli import main
from starflow.models.config import FlowConfig
from starflow.training.flow import FlowRunConfig, FlowTrainer
from starflow.training.metrics import LOGGERS, BlockTerms, Meter
from starflow.training.work import step_flops

MODEL = {
    "image_size": 8, "image_channels": 1, "patch_size": 2, "channels": 16, "layers": [1, 1, 1], "head_dim": 8,
    "levels": 17,
}  # fmt: skip
TRAINING = {"steps": 4, "batch_size": 8, "sample_every": 0, "checkpoint_every": 0, "log_every": 2, "ema": 0.5}


def run_config(**training) -> FlowRunConfig:
    return FlowRunConfig.from_dict({"model": MODEL, "data": {}, "training": {**TRAINING, **training}})


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"checkpoint_layers": True}])
def test_the_terms_of_the_blocks_add_up_to_the_loss(options, tmp_path):
    trainer = FlowTrainer(run_config(**options, learning_rate=0.01), tmp_path)
    trainer.run(quiet=True)
    for metrics in trainer.metrics:
        logdets = [metrics[f"logdet_{i}"] for i in range(3)]
        assert metrics["prior"] - sum(logdets) == pytest.approx(metrics["loss"], rel=1e-5)
    assert all(abs(value) > 1e-6 for value in logdets)


def test_terms_are_means_over_passes_and_processes():
    flow = Flow(FlowConfig(**MODEL))
    for weight in flow.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    terms, x = BlockTerms(flow.blocks, 64), torch.randn(4, 1, 8, 8)
    whole = flow(x)
    whole_terms = terms.read(lambda values: values)
    for part in x.split(2):
        flow(part)
    assert terms.read(lambda values: values) == pytest.approx(whole_terms, rel=1e-4)
    expected = 0.5 * whole.z.square().mean() - whole.logdet.mean() / 64
    assert whole_terms["prior"] - sum(list(whole_terms.values())[1:]) == pytest.approx(expected.item(), rel=1e-4)
    flow(x)
    assert terms.read(lambda values: 2 * values)["prior"] == pytest.approx(2 * whole_terms["prior"], rel=1e-4)


def test_a_meter_counts_the_time_of_steps_alone(monkeypatch):
    times = iter([0.0, 2.0, 10.0, 12.0, 20.0, 30.0])
    monkeypatch.setattr("starflow.training.metrics.time", types.SimpleNamespace(perf_counter=lambda: next(times)))
    meter = Meter("cpu", devices=2, tokens=16, flops=1e12)
    meter.stop(8)
    meter.start()
    meter.stop(8)
    meter.tflops = 8.0
    found = meter.read()
    assert found["images_per_second"] == 4 and found["tokens_per_second"] == 64 and found["flop_utilisation"] == 0.25
    assert 1e-3 < found["peak_memory_gb"] < 1e3
    meter.tflops = 0.0
    meter.start()
    meter.stop(5)
    found = meter.read()
    assert found["images_per_second"] == 0.5 and "flop_utilisation" not in found


def test_metrics_are_written_with_speed_and_a_resumed_run_keeps_them(tmp_path):
    trainer = FlowTrainer(run_config(checkpoint_every=2), tmp_path)
    trainer.meter.tflops = 1.0
    step = trainer.train_step

    def interrupted(*batch):
        if trainer.step == 3:
            raise KeyboardInterrupt
        return step(*batch)

    trainer.train_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.run(quiet=True)
    first = (tmp_path / "metrics.jsonl").read_text().splitlines()[0]
    FlowTrainer.resume(tmp_path).run(quiet=True)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines[0] == first and [json.loads(line)["step"] for line in lines] == [2, 4]
    found = json.loads(first)
    assert found["tokens_per_second"] == pytest.approx(16 * found["images_per_second"])
    flops = step_flops(trainer.config.model, 1)
    assert found["flop_utilisation"] == pytest.approx(found["images_per_second"] * flops / 1e12)


class FakeWandb(types.ModuleType):
    """Module that records what it is given."""

    def __init__(self):
        super().__init__("wandb")
        self.started, self.logged, self.finished = [], [], 0

    def init(self, **options):
        self.started.append(options)
        return self

    def log(self, metrics, step):
        self.logged.append((step, metrics))

    def finish(self):
        self.finished += 1


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "tiny.yaml").write_text(json.dumps(run_config().to_dict()))
    return str(tmp_path / "tiny.yaml")


def test_metrics_go_to_weights_and_biases(tmp_path, settings, monkeypatch, capsys):
    fake, out = FakeWandb(), str(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert main(["train", "--config", settings, "--out", out, "--wandb", "--quiet"]) == 0
    (started,) = fake.started
    assert (started["project"], started["name"], started["resume"]) == ("starflow", "run", "allow")
    assert started["config"]["model"]["channels"] == 16 and fake.finished == 1
    assert [step for step, _ in fake.logged] == [2, 4]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [metrics for _, metrics in fake.logged] == lines
    main(["train", "--resume", out, "--wandb", "--quiet"])
    assert fake.started[1]["id"] == started["id"]


def test_a_missing_package_is_named_in_one_line(tmp_path, settings, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    error = fails(capsys, "train", "--config", settings, "--out", str(tmp_path / "run"), "--wandb")
    assert error.endswith("--wandb needs the package wandb: pip install 'starflow-kernels[logging]'")


def test_a_full_disk_under_tensorboard_is_one_clear_error(tmp_path):
    """A limit on the size of files stands for it. The thread that writes the file says nothing of its own."""
    pytest.importorskip("tensorboard")
    code = (
        "import resource, sys, torch._dynamo; from pathlib import Path\n"
        "from starflow.errors import StarflowError; from starflow.training.metrics import LOGGERS\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))\n"
        "logger = LOGGERS['tensorboard'](Path(sys.argv[1]), {})\n"
        "try:\n"
        "    logger.log({f'name {i}': 1.0 for i in range(100)}, 1)\n"
        "    logger.close()\n"
        "except StarflowError as error:\n"
        "    print(error)"
    )
    found = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert found.stdout == f"cannot write {tmp_path / 'tensorboard'}: File too large\n" and found.stderr == ""


def test_a_logger_that_fails_leaves_no_lock(tmp_path, monkeypatch):
    class Full:
        def log(self, metrics, step):
            pass

        def close(self):
            raise StarflowError("cannot write the curves")

    monkeypatch.setitem(LOGGERS, "full", lambda folder, settings: Full())
    trainer = FlowTrainer(run_config(steps=1), tmp_path, loggers=["full"])
    with pytest.raises(StarflowError, match="cannot write the curves"):
        trainer.run(quiet=True)
    assert not (tmp_path / ".lock").exists() and FlowTrainer.resume(tmp_path).step == 1
