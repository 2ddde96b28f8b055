"""Parity with the released TarFlow and STARFlow code, whose weights and outputs are in tests/fixtures/parity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from starflow import Flow, FlowConfig, Guidance

FOLDER = Path(__file__).parents[1] / "fixtures" / "parity"
CASES = [
    "starflow",
    "starflow_gemma",
    "starflow_plain",
    "starflow_resolution",
    "tarflow",
    "tarflow_annealed",
    "tarflow_mean_class",
    "tarflow_temperature",
    "tarflow_volume_preserving",
]


class Case(NamedTuple):
    """A flow with the released weights, and the inputs and outputs of the released code."""

    flow: Flow
    tensors: dict[str, torch.Tensor]
    guidance: Guidance

    def noise(self) -> torch.Tensor:
        """Noise of the prior: the stored standard normal draws, scaled where the flow preserves volume."""
        noise = self.tensors["noise"]
        if self.flow.prior_variance is None:
            return noise
        return self.flow.images(self.flow.tokens(noise) * self.flow.prior_variance.sqrt())

    def sampling_context(self) -> dict[str, torch.Tensor | None]:
        return {"labels": self.tensors.get("sample_labels"), "text": self.tensors.get("text")}


def load(name: str) -> Case:
    path = FOLDER / f"{name}.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    weights = {key.removeprefix("weights."): tensors.pop(key) for key in list(tensors) if key.startswith("weights.")}
    flow = Flow(FlowConfig.from_dict(json.loads(metadata["config"])))
    flow.load_state_dict(weights)
    return Case(flow, tensors, Guidance(**json.loads(metadata["guidance"])))


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return load(request.param)


def assert_parity(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("grad", [False, True])
def test_forward(case, grad):
    with torch.set_grad_enabled(grad):
        z, logdet, _ = case.flow(case.tensors["x"], case.tensors.get("labels"), case.tensors.get("text"))
    assert z.requires_grad is grad
    assert_parity(z, case.tensors["z"])
    assert_parity(logdet, case.tensors["logdet"])


def test_inverse(case):
    assert_parity(case.flow.inverse(case.noise(), **case.sampling_context()), case.tensors["sample"])


def test_guided_inverse(case):
    guided = case.flow.inverse(
        case.noise(),
        **case.sampling_context(),
        guidance=case.guidance,
        empty_text=case.tensors.get("empty_text"),
    )
    assert_parity(guided, case.tensors["guided"])


def test_guidance_matters(case):
    assert (case.tensors["guided"] - case.tensors["sample"]).abs().max() > 1e-2


def test_prior_of_volume_preserving_flow():
    case = load("tarflow_volume_preserving")
    assert (case.flow.prior_variance - 1).abs().max() > 0.1
    case.flow.update_prior(case.flow.tokens(case.tensors["z"]))
    assert_parity(case.flow.prior_variance, case.tensors["updated_variance"])
