"""Launches of a sampling step, counted in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from support.backends import require_interpreter

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.sampling import codes
from benchmarks.gpu.sampling_cases import GUIDED, WEIGHTS, make, starflow, tarflow
from benchmarks.gpu.sampling_checks import launches_a_step

require_interpreter()


@pytest.mark.parametrize(
    "specs, options", [(tarflow(3, 16, 2, head_dim=16), {}), (starflow(16, (2,), 5, 8), {"text": 2, **GUIDED})]
)
def test_a_step_is_at_most_five_launches_per_layer_and_one(specs, options):
    code, problem = codes(WEIGHTS["float32"])["ours, triton"], make(specs, 1, 4, torch.float32, "cpu", **options)
    assert 0 < launches_a_step(problem, code.start, Bench(dry=True)) <= code.most(2) == 11
