"""Weights that accelerate keeps elsewhere, or that FSDP shards, are brought to their device by both directions."""

from __future__ import annotations

import functools

import pytest
import torch
from support import sharded
from support.flows import make

from starflow import Guidance
from starflow.models.certificate import certificate

accelerate = pytest.importorskip("accelerate")

CPU = torch.device("cpu")
LABELS = torch.arange(4)


def cpu(flow, folder):
    return accelerate.cpu_offload(flow, CPU)


def disk(flow, folder):
    return accelerate.disk_offload(flow, folder, CPU)


def one_block_on_disk(flow, folder):
    return accelerate.dispatch_model(flow, {"blocks.0": "cpu", "blocks.1": "disk"}, CPU, offload_dir=folder)


def model(flow, folder):
    return accelerate.cpu_offload_with_hook(flow, CPU)[0]


@pytest.fixture(params=[cpu, disk, one_block_on_disk, model], ids=lambda offload: offload.__name__)
def offload(request, tmp_path):
    """Return a function that offloads a flow."""
    return functools.partial(request.param, folder=tmp_path)


def results(flow) -> list:
    """Return results of the public methods of a flow."""
    labels = LABELS if flow.config.num_classes else None
    z = flow.noise(4, torch.Generator().manual_seed(0))
    x = flow.inverse(z, labels).x
    exact = certificate(flow, x, z, labels)
    images = flow.sample(4, labels, guidance=Guidance(float(labels is not None)), denoise=1.0, certify=True).images
    return [x, flow.log_prob(x, labels), flow.denoise(x, labels), images, torch.tensor(exact)]


@pytest.mark.parametrize("changes", [{}, {"rotary": "half", "num_classes": 0, "start": False}], ids=["table", "rotary"])
def test_an_offloaded_flow_gives_the_same_results(offload, changes):
    expected = results(make(**changes))
    flow = offload(make(**changes))
    devices = {parameter.device.type for parameter in flow.parameters()}
    for _ in range(2):
        assert all(map(torch.equal, results(flow), expected))
    assert {parameter.device.type for parameter in flow.parameters()} == devices


def test_weights_on_disk_leave_the_memory_again(tmp_path):
    flow = disk(make(), tmp_path)
    flow.inverse(torch.zeros(4, 3, 8, 8), LABELS)
    assert all(parameter.is_meta for parameter in flow.parameters())
    assert flow.device == CPU


def test_an_offloaded_flow_is_calibrated_for_its_device(tmp_path):
    assert cpu(make(), tmp_path).calibrate(2).conditions.device == "cpu"


def test_a_sharded_flow_samples_and_trains_like_a_whole_one(tmp_path):
    assert sharded.run(tmp_path) == [0, 0]


def test_a_flow_without_values_is_refused():
    flow = make().to("meta")
    with pytest.raises(ValueError, match="z: on meta, a device without values"):
        flow.inverse(torch.empty(2, 3, 8, 8, device="meta"))
