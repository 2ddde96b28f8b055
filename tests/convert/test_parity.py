"""Parity with the upstream TarFlow and STARFlow code, whose weights and outputs are in tests/fixtures/parity."""

from __future__ import annotations

import pytest
import torch
from support.parity import Case, assert_parity, load

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


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return load(request.param)


@pytest.mark.parametrize("grad", [False, True])
def test_forward_agrees_with_upstream(case, grad):
    with torch.set_grad_enabled(grad):
        z, logdet, _ = case.flow(case.tensors["x"], case.tensors.get("labels"), case.tensors.get("text"))
    assert z.requires_grad is grad
    assert_parity(z, case.tensors["z"])
    assert_parity(logdet, case.tensors["logdet"])


def test_inverse_agrees_with_upstream(case):
    assert_parity(case.flow.inverse(case.noise(), **case.sampling_context()).x, case.tensors["sample"])


def test_guided_inverse_agrees_with_upstream(case):
    guided = case.flow.inverse(
        case.noise(),
        **case.sampling_context(),
        guidance=case.guidance,
        empty_text=case.tensors.get("empty_text"),
    ).x
    assert_parity(guided, case.tensors["guided"])


def test_guidance_changes_the_samples(case):
    assert (case.tensors["guided"] - case.tensors["sample"]).abs().max() > 1e-2


def test_the_prior_update_agrees_with_upstream():
    case = load("tarflow_volume_preserving")
    assert (case.flow.prior_variance - 1).abs().max() > 0.1
    case.flow.update_prior(case.flow.tokens(case.tensors["z"]))
    assert_parity(case.flow.prior_variance, case.tensors["updated_variance"])
