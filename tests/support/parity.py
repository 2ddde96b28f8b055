"""Weights, inputs and outputs of the upstream code, from tests/fixtures/parity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from starflow import Flow, FlowConfig, Guidance

FOLDER = Path(__file__).parents[1] / "fixtures" / "parity"


class Case(NamedTuple):
    """A flow with the upstream weights, and the inputs and outputs of the upstream code."""

    flow: Flow
    tensors: dict[str, torch.Tensor]
    guidance: Guidance

    def noise(self) -> torch.Tensor:
        """Return noise of the prior: the stored standard normal draws, scaled where the flow preserves volume."""
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


def assert_parity(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
