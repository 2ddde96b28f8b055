"""Checkpoints: strict, whole or absent, and clear about what is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from starflow import CheckpointError, ConfigError, Flow, FlowConfig, StarflowError, open_model
from starflow.io.files import write_atomically, write_text

CONFIG = {"image_size": 4, "image_channels": 1, "patch_size": 2, "channels": 16, "layers": (1, 1), "head_dim": 8}


@pytest.fixture
def saved(tmp_path):
    flow = Flow(FlowConfig(**CONFIG, num_classes=3, scale="unit"))
    for parameter in flow.parameters():
        parameter.data.normal_()
    flow.save_pretrained(tmp_path / "model")
    return flow, tmp_path / "model"


def edit(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def test_round_trip(saved):
    flow, folder = saved
    again = Flow.from_pretrained(folder)
    assert again.config == flow.config and not again.training
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in flow.state_dict().items()}
    assert all(torch.equal(t, flow.state_dict()[n]) for n, t in again.state_dict().items())
    assert next(Flow.from_pretrained(folder, dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_reading_a_model_does_not_import_the_compiler_of_torch():
    code = "import sys, starflow; starflow.Flow.from_pretrained('digits'); print('torch._dynamo' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_bundled_digits():
    flow = Flow.from_pretrained("digits")
    assert flow.config.num_classes == 10 and flow.config.levels == 17


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.proj_in.weight"), "lacks weights blocks.1.proj_in.weight"),
        (lambda s: s.update(extra=torch.zeros(1)), "unknown weights extra"),
        (lambda s: s.update({"blocks.0.start": torch.zeros(4)}), "unknown weights blocks.0.start"),
        (lambda s: s.update({"blocks.0.class_embed": torch.zeros(4, 16)}), r"blocks.0.class_embed .*\(4, 16\)"),
        (lambda s: s.update({"blocks.0.class_embed": torch.zeros(3, 16, dtype=torch.int64)}), "int64"),
    ],
)
def test_weights_that_do_not_fit(saved, change, message):
    _, folder = saved
    edit(folder, change)
    with pytest.raises(CheckpointError, match=message):
        Flow.from_pretrained(folder)


def test_damaged_files(saved, tmp_path):
    _, folder = saved
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        Flow.from_pretrained(tmp_path / "nothing")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Flow.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Flow.from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Flow.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chanels": 3}, "unknown model settings chanels"),
        ({"patch_size": 3}, "patch_size=3"),
        ({"scale": "log"}, "scale='log'"),
        ({"layers": []}, "layers"),
        ({"layers": [1, 0]}, "layers=0"),
        ({"head_dim": 5}, "head_dim=5"),
        ({"kv_heads": 3}, "kv_heads=3"),
        ({"rotary": "spiral"}, "rotary='spiral'"),
        ({"text_dim": 8}, "text_len"),
        ({"levels": 1}, "levels=1"),
        ({"noise_std": float("nan")}, "noise_std"),
        ({"channels": "64"}, "channels='64'"),
        ({"num_classes": True}, "num_classes"),
    ],
)
def test_settings_are_checked(change, message):
    with pytest.raises(ConfigError, match=message):
        FlowConfig.from_dict({**CONFIG, **change})


def test_config_survives_json():
    config = FlowConfig(**CONFIG, rotary="half", noise_std=0.05)
    assert FlowConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ConfigError, match="missing model settings channels"):
        FlowConfig.from_dict({k: v for k, v in CONFIG.items() if k != "channels"})


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(StarflowError, match=r"cannot write .*file: No space left on device"):
        write_atomically(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("save", ["model", "state"])
def test_a_full_disk(saved, save):
    flow, _ = saved
    with pytest.raises(StarflowError, match="cannot write /dev/full"):
        if save == "model":
            flow.save_pretrained("/dev/full/model")
        else:
            write_text("/dev/full/x", "text")


@pytest.mark.parametrize("device", ["nowhere", "hpu", "cuda:1000"])
def test_a_device_that_torch_cannot_use(device):
    with pytest.raises(ConfigError, match=f"device {device}: "):
        open_model("digits", device)
    with pytest.raises(ConfigError, match=f"device {device}: "):
        Flow.from_pretrained("digits", device)


def test_a_flow_has_no_variants():
    with pytest.raises(ConfigError, match="variant='fp16': digits is no folder of a pipeline"):
        open_model("digits", variant="fp16")


def test_a_bundled_name_wins_over_a_folder_and_a_path_does_not(tmp_path):
    os.mkdir("digits")
    assert open_model("digits").config == Flow.from_pretrained("digits").config
    for path in ("./digits", Path("digits")):
        with pytest.raises(CheckpointError, match="no checkpoint at"):
            Flow.from_pretrained(path)
