"""Presets of the published models agree with what the converter reads from their files."""

import dataclasses
from pathlib import Path

import pytest
from support.upstream import THREE_BILLION

from starflow.convert import names
from starflow.convert.formats import flow_config, parse_arguments, read_arguments
from starflow.settings import PRESETS, presets, read_settings
from starflow.training.flow import FlowRunConfig

FILES = {
    "tarflow-imagenet64-likelihood": "imagenet64_model_2_768_8_8_uniform.pth",
    "tarflow-imagenet64": "imagenet64_model_2_768_8_8_0.05.pth",
    "tarflow-imagenet64-class": "imagenet_model_2_768_8_8_0.05.pth",
    "tarflow-imagenet64-class-patch4": "imagenet_model_4_1024_8_8_0.05.pth",
    "tarflow-imagenet128-class": "imagenet_model_4_1024_8_8_0.15.pth",
    "tarflow-afhq256-class": "afhq_model_8_768_8_8_0.07.pth",
}
IMAGENET = 1_281_167


def preset(name: str) -> FlowRunConfig:
    return FlowRunConfig.from_dict(read_settings(PRESETS / f"{name}.yaml"))


@pytest.mark.parametrize("name", FILES)
def test_tarflows_are_those_of_the_published_files(name):
    model = preset(name).model
    ours, theirs = names.weight_shapes(model), names.upstream_names(model)
    shapes = {theirs[n]: names.upstream_shape(n, s) for n, s in ours.items()} | names.dead_buffers(model)
    assert flow_config(*((given := read_arguments(Path(FILES[name]), None))[0], shapes, given[1])) == model


def test_starflow_is_that_of_the_published_settings():
    arguments = parse_arguments({"arguments": [{k: v} for k, v in THREE_BILLION.items()]}, "3B")
    # Latents have no gray levels; the published settings do not say so.
    converted = dataclasses.replace(flow_config(arguments, {}, "3B"), levels=0)
    assert preset("starflow-text256").model == converted
    smaller = {"channels": 2048, "layers": (2, 2, 2, 2, 2, 18), "num_classes": 1000, "text_dim": 0, "text_len": 0}
    assert preset("starflow-imagenet256-class").model == dataclasses.replace(converted, **smaller)


def test_every_published_model_has_a_preset():
    published = {name for name in presets() if name.startswith(("tarflow-", "starflow-"))}
    assert published == {*FILES, "starflow-text256", "starflow-imagenet256-class"}


@pytest.mark.parametrize("name", [*FILES, "starflow-text256", "starflow-imagenet256-class"])
def test_schedules_are_whole_epochs_with_one_of_warm_up(name):
    training, images = preset(name).training, 14_630 if "afhq" in name else IMAGENET
    assert training.warmup_steps == images // training.batch_size
    assert training.steps % training.warmup_steps == 0
    assert (training.beta1, training.beta2, training.weight_decay, training.min_learning_rate) == (
        0.9,
        0.95,
        1e-4,
        1e-6,
    )
    assert training.bf16 == (name != "tarflow-imagenet64-likelihood")
    assert training.label_drop == (0.1 if name.endswith("class") or "patch4" in name or "text" in name else 0.0)
