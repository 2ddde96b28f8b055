"""Plans of training: memory is what a step takes, work is what torch counts, and advice leads to a plan that fits."""

import dataclasses
import json
import re

import pytest
import torch
from support.commands import fails
from support.memory import LiveBytes
from torch.utils.flop_counter import FlopCounterMode

from starflow import ConfigError, Flow
from starflow.cli import main
from starflow.seeds import generator
from starflow.settings import PRESETS, read_settings
from starflow.training.flow import FlowRunConfig, FlowTrainer
from starflow.training.plan import Machine, Switches, plan
from starflow.training.work import step_flops
from starflow_kernels._core import compiled
from starflow_kernels.block import composed

BASE = {"image_size": 16, "image_channels": 3, "patch_size": 2, "head_dim": 16, "noise_std": 0.05}
STARFLOW = {
    "rotary": "interleaved", "start": True, "scale": "softplus", "soft_clip": 4.0, "final_norm": True,
    "condition_blocks": "last", "num_classes": 4,
}  # fmt: skip
GATED = {"mlp": "swiglu", "norm": "rms_norm", "rotary": "interleaved", "qk_norm": True, "post_norm": True}
# Weights of the first model, values for the backward pass of the others, take most of the memory.
MODELS = {
    "wide": ({"channels": 256, "layers": [2, 2]}, {"batch_size": 1}),
    "classes": ({"channels": 64, "layers": [2, 2, 2], "num_classes": 10}, {"batch_size": 32, "ema": 0.9}),
    "deep last block": ({"channels": 64, "layers": [1, 1, 4], **STARFLOW}, {"batch_size": 32}),
    "gated": ({"channels": 64, "layers": [2, 2], **GATED}, {"batch_size": 16}),
    "checkpoints": ({"channels": 64, "layers": [4, 4]}, {"batch_size": 32, "checkpoint_layers": True}),
    "parts": ({"channels": 128, "layers": [2, 2]}, {"batch_size": 16, "accumulate": 2}),
    "dropout": ({"channels": 96, "layers": [3, 3]}, {"batch_size": 16, "dropout": 0.1}),
}


def run_config(model: dict, **training) -> FlowRunConfig:
    training = {"steps": 3, "sample_every": 0, "checkpoint_every": 0, **training}
    return FlowRunConfig.from_dict(
        {"model": {**BASE, **model}, "data": {"source": "photos", "size": 16}, "training": training}
    )


def preset(name: str, **training) -> FlowRunConfig:
    settings = read_settings(PRESETS / f"{name}.yaml")
    settings["training"] |= training
    return FlowRunConfig.from_dict(settings)


def measured_peak(config: FlowRunConfig, folder) -> int:
    """Return the largest bytes of tensors in the second step of a run."""
    trainer, rows = FlowTrainer(config, folder), range(config.training.batch_size)
    batch = torch.stack([trainer.images[i][0] for i in rows]), torch.zeros(len(rows), dtype=torch.int64)
    trainer.train_step(generator(0), *batch)
    weights = [*trainer.flow.parameters(), *(trainer.average or {}).values()]
    moments = [v for state in trainer.optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    with LiveBytes([*weights, *moments, *(p.grad for p in trainer.flow.parameters())]) as live:
        trainer.train_step(generator(1), *batch)
    return live.peak


# The native kernels run layers of TarFlow in float32.
CASES = [
    *((name, bf16, kernels) for name in MODELS for bf16 in (False, True) for kernels in ("torch", "gpu")),
    *((name, False, "native") for name in MODELS if name != "gated" and not compiled.native_unavailable()),
]


@pytest.mark.parametrize(("name", "bf16", "kernels"), CASES)
def test_the_planned_memory_is_what_a_step_takes(name, bf16, kernels, tmp_path, monkeypatch):
    model, training = MODELS[name]
    if kernels != "native":
        monkeypatch.setattr(composed, "_on_native", lambda *_: False)
    if kernels == "gpu":
        # The ops that run on a GPU, by their references.
        monkeypatch.setattr(composed, "_on_gpu", lambda x: True)
    config = run_config(model, **training, bf16=bf16)
    planned = plan(config, Machine(gpus=1), kernels=kernels)
    assert planned.peak == pytest.approx(measured_peak(config, tmp_path), rel=0.15)


def test_products_are_those_that_torch_counts(monkeypatch):
    monkeypatch.setattr(composed, "_on_native", lambda *_: False)
    config, images = run_config(MODELS["deep last block"][0], batch_size=2), 2
    flow, (tokens, token_dim) = Flow(config.model), config.model.token_shape
    with FlopCounterMode(display=False) as counter:
        flow(torch.zeros(images, 3, 16, 16), torch.zeros(images, dtype=torch.int64))
    # torch does not look into the ops of attention and of the head.
    attention = sum(config.model.layers) * 2 * 64 * tokens * (tokens + 1)
    head = len(config.model.layers) * 2 * 64 * 2 * token_dim * tokens
    classes = 2 * 4 * 64
    assert counter.get_total_flops() / images == step_flops(config.model, 1) / 3 - attention - head + classes


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("starflow-text256", 3_858_281_544), ("tarflow-imagenet64-likelihood", 460_142_784)],
)
def test_parameters_of_the_published_models(name, parameters):
    assert plan(preset(name), Machine()).parameters == parameters


def test_advice_leads_to_a_run_that_fits():
    config, machine = preset("starflow-text256"), Machine()
    first = plan(config, machine)
    assert not first.fits and first.advice == (
        "--set training.parallel=fsdp --set training.accumulate=8 takes 69.9 GB per device"
    )
    switches = Switches(parallel="fsdp", accumulate=8, bf16=True)
    better = plan(config, machine, switches)
    assert better.fits and not better.advice and better.images == 16
    assert better.peak / 1e9 == pytest.approx(69.9, abs=0.05)
    tiny = plan(config, dataclasses.replace(machine, memory_gb=1))
    assert tiny.advice == "no switch makes it fit: use more devices, or devices with more memory"


def test_advice_divides_the_batch_evenly():
    config = preset("starflow-text256")
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, batch_size=72))
    found = plan(config, Machine(gpus=3, memory_gb=40))
    (accumulate,) = map(int, re.findall(r"accumulate=(\d+)", found.advice))
    assert accumulate > 1 and 24 % accumulate == 0


@pytest.mark.parametrize(
    "machine, accumulate, message",
    [
        (Machine(gpus=3), 1, "training.batch_size=1024: 3 processes times training.accumulate=1 do not divide it"),
        (Machine(gpus=8), 7, "8 processes times training.accumulate=7 do not divide it"),
        (Machine(gpus=2048), 1, "2048 processes"),
    ],
)
def test_a_batch_that_training_would_refuse_is_not_planned(machine, accumulate, message):
    with pytest.raises(ConfigError, match=message):
        plan(preset("starflow-text256"), machine, Switches(accumulate=accumulate))


@pytest.mark.parametrize("field", [{"tflops": 1e300}, {"utilisation": 1e-320}, {"memory_gb": 0.0}])
def test_a_machine_that_does_not_exist_is_refused(field):
    with pytest.raises(ConfigError, match="expected a number from 1e-09 to 1e"):
        Machine(**field)


def test_each_switch_saves_what_it_is_for():
    config, machine = preset("starflow-text256"), Machine()
    plain = plan(config, machine, Switches(bf16=True))
    sharded = plan(config, machine, Switches(bf16=True, parallel="fsdp"))
    kept = plan(config, machine, Switches(bf16=True, parallel="fsdp", reshard_after_forward=False))
    again = plan(config, machine, Switches(bf16=True, checkpoint_layers=True))
    parts = plan(config, machine, Switches(bf16=True, accumulate=4))
    single = plan(config, machine, Switches())
    assert sharded.memory["weights"] == pytest.approx(plain.memory["weights"] / 8, rel=1e-6)
    assert 10 * sharded.memory["gathered weights"] < kept.memory["gathered weights"] == plain.memory["weights"] / 2
    assert sharded.memory["bfloat16 weights"] == 0 < plain.memory["bfloat16 weights"]
    assert again.memory["activations"] < plain.memory["activations"] / 5 and 1.3 < again.flops / plain.flops < 4 / 3
    assert parts.memory["activations"] == pytest.approx(plain.memory["activations"] / 4, rel=1e-3)
    assert single.memory["bfloat16 weights"] == 0 and single.memory["activations"] > plain.memory["activations"]


def test_time_follows_from_work_and_peak():
    config = preset("tarflow-imagenet64")
    found = plan(config, Machine(gpus=4, tflops=100, utilisation=0.5))
    assert found.flops == step_flops(config.model, 256)
    assert found.seconds == pytest.approx(found.flops / 2e14)
    assert found.tokens_per_second == pytest.approx(256 * 1024 / found.seconds)
    assert found.days == pytest.approx(found.seconds * 1_000_800 / 86400)


@pytest.mark.parametrize("wrong", [{"gpus": 0}, {"memory_gb": -1.0}, {"utilisation": 1.5}, {"tflops": float("nan")}])
def test_wrong_machines_are_named(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Machine(**wrong)


def test_a_dry_run_needs_no_data_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--preset", "starflow-text256", "--dry-run", "--gpus", "64", "--json"]) == 0
    captured = capsys.readouterr()
    results = json.loads(captured.out)["results"]
    assert results["parameters"] == 3_858_281_544 and results["machine"]["gpus"] == 64
    assert "3.86 B" in captured.err and "does not fit into 80 GB" in captured.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "photos", "--gpus", "2"], "--gpus: it describes devices for --dry-run"),
        (["--resume", "run", "--dry-run"], "--dry-run plans a new run"),
        (["--preset", "photos", "--dry-run", "--utilisation", "2"], "utilisation=2.0: expected at most 1"),
        (["--preset", "photos", "--dry-run", "--memory-gb", "much"], "'much' is not a number above 0"),
    ],
)
def test_wrong_arguments_of_a_dry_run_are_named(arguments, message, capsys):
    assert message in fails(capsys, "train", *arguments)
