"""The check for values that are not finite."""

from __future__ import annotations

import math

import pytest
import torch

from starflow_kernels._core.checks import all_finite

LARGEST = torch.finfo(torch.float32).max


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [0, 1, 17, 2**20 + 3])
def test_finite_values(size, dtype):
    # The sum of the last two is infinite.
    values = torch.randn(size, dtype=torch.float32).to(dtype)
    values[-2:] = torch.tensor([LARGEST / 2, LARGEST / 2]).to(dtype)[:size]
    assert all_finite(values)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("size", "place"), [(1, 0), (17, 0), (17, 16), (2**20 + 3, 2**19), (2**20 + 3, 2**20 + 2)])
def test_one_value_that_is_not(size, place, dtype, bad):
    values = torch.zeros(size, dtype=dtype)
    values[place] = bad
    assert not all_finite(values)


def test_values_with_gaps():
    values = torch.zeros(4, 6, dtype=torch.float32)
    values[:, 3] = math.nan
    assert all_finite(values[:, ::2]) and not all_finite(values.T)
