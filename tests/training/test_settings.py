"""Settings are read as they are meant: every value has the declared type, and files are in UTF-8."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from starflow import ConfigError, FlowConfig, Guidance, Inversion
from starflow.data.datasets import DataConfig
from starflow.data.encode import EncodeConfig
from starflow.sampling.jobs import Layout
from starflow.sampling.sample import SampleOptions
from starflow.settings import override, read_settings
from starflow.training.autoencoder import AutoencoderConfig
from starflow.training.config import LoopConfig
from starflow.training.decoder import DecoderConfig
from starflow.training.flow import FlowRunConfig, FlowTrainingConfig
from starflow_kernels import BlockSpec, Solver

MODEL = {"image_size": 8, "image_channels": 1, "patch_size": 2, "channels": 16, "layers": [1, 1], "head_dim": 8}
CONFIGS = {
    FlowConfig: MODEL,
    DataConfig: {},
    FlowTrainingConfig: {"steps": 1, "batch_size": 1},
    LoopConfig: {"steps": 1, "batch_size": 1},
    AutoencoderConfig: {},
    DecoderConfig: {"vae": "folder"},
    EncodeConfig: {"data": DataConfig(), "vae": "folder"},
    Guidance: {},
    Inversion: {"method": "jacobi"},
    SampleOptions: {},
    Layout: {},
}
WRONG = {"none": None, "'false'": "false", "[true]": [True], "[none]": [None], "{}": {}, "b'no'": b"no"}
CASES = [
    pytest.param(kind, field.name, value, id=f"{kind.__name__}.{field.name}={name}")
    for kind in CONFIGS
    for field in dataclasses.fields(kind)
    for name, value in WRONG.items()
    if not (value is None and "None" in str(field.type)) and not (isinstance(value, str) and field.type == "str")
]


@pytest.mark.parametrize("kind, name, value", CASES)
def test_a_value_of_another_type_is_refused_by_name(kind, name, value):
    with pytest.raises(ConfigError, match=f"{name}=.*: expected") as error:
        kind(**{**CONFIGS[kind], name: value})
    assert repr(value) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [True, "1", 1.0])
def test_an_integer_is_neither_true_nor_text_nor_a_float(value):
    with pytest.raises(ConfigError, match=f"kv_heads={value!r}: expected an integer"):
        FlowConfig(**MODEL, kv_heads=value)


def test_an_integer_is_a_number_and_a_list_becomes_a_tuple():
    config = FlowConfig(**MODEL, soft_clip=1)
    assert config.soft_clip == 1 and config.layers == (1, 1)


@pytest.mark.parametrize(
    "assignment, message",
    [
        ("model.bias='false'", "bias='false': expected true or false"),
        ("model.start=None", "start='None': expected true or false"),
        ("model.layers=[true]", r"layers=\[True\]: expected a list, each entry an integer"),
        ("data.resize=", "data: resize=None: expected true or false"),
        ("data.seed=abc", "data: seed='abc': expected an integer"),
        ("data.path=2024", r"data: path=2024: expected text \(a number in quotes\)"),
        ("training.bf16=1", "training: bf16=1: expected true or false"),
        ("training.1=1", "unknown FlowTrainingConfig settings 1"),
    ],
)
def test_an_override_of_another_type_is_refused(assignment, message):
    settings = {"model": MODEL.copy(), "data": {}, "training": {"steps": 1, "batch_size": 1}}
    override(settings, [assignment])
    with pytest.raises(ConfigError, match=message):
        FlowRunConfig.from_dict(settings)


def test_names_that_are_numbers_are_reported():
    with pytest.raises(ConfigError, match="unknown model settings 3"):
        FlowConfig.from_dict({**MODEL, 3: 4})
    with pytest.raises(ConfigError, match="SECTION of 1"):
        override({1: {}}, ["model.bias=true"])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_files_are_read_in_utf8_with_or_without_a_byte_order_mark(encoding, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data: {class_names: [Zürich, 東京]}\n", encoding=encoding)
    assert read_settings(path) == {"data": {"class_names": ["Zürich", "東京"]}}


@pytest.mark.parametrize("change", [{"bias": "false"}, {"start": None}, {"layers": [1]}, {"heads": True}])
def test_a_block_spec_takes_no_value_of_another_type(change):
    sizes = {"token_dim": 1, "channels": 8, "layers": 1, "heads": 1, "head_dim": 8, "kv_heads": 1, "mlp_dim": 8}
    with pytest.raises(TypeError, match=f"{next(iter(change))}=.*: expected"):
        BlockSpec(**{**sizes, **change})
    with pytest.raises(TypeError, match="slide='false': expected bool"):
        Solver(slide="false")


@pytest.mark.parametrize("weight", [np.float32(2), np.array(2), torch.tensor(2.0), torch.tensor(2)], ids=repr)
def test_a_number_of_numpy_or_torch_is_a_number(weight):
    assert Guidance(weight) == Guidance(2.0) and type(Guidance(weight).weight) in (int, float)


@pytest.mark.parametrize("name", ["weight", "temperature"])
def test_an_integer_beyond_all_floats_is_no_number(name):
    with pytest.raises(ConfigError, match=f"^{name}=1000.{{,40}}: expected a number"):
        Guidance(**{name: 10**400})


@pytest.mark.parametrize("weight", [torch.ones(2), torch.tensor(True), np.bool_(True)], ids=repr)
def test_other_values_of_numpy_or_torch_are_no_number(weight):
    with pytest.raises(ConfigError, match="expected a number"):
        Guidance(weight)
