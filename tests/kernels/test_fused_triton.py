"""The rotation before a fused attention, in Triton: TRITON_INTERPRET=1 pytest tests/test_fused_triton.py."""

from __future__ import annotations

import pytest
import torch
from support.backends import require_interpreter
from support.causal_attention import inputs, naive, rotary_options
from support.contract import assert_within_contract, strided, with_gradients
from support.naive import angles

from starflow_kernels import causal_attention
from starflow_kernels._core.numerics import apply_rotary
from starflow_kernels.causal_attention.external import turn, turn_back

require_interpreter()
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


def pairs_apart(x: torch.Tensor, rotary: str) -> torch.Tensor:
    return torch.cat([x[..., 0::2], x[..., 1::2]], -1) if rotary == "interleaved" else x


@every_dtype
@pytest.mark.parametrize("rotary", ["interleaved", "half"])
@pytest.mark.parametrize("T, H, d", [(1, 1, 2), (65, 3, 24), (64, 2, 80), (33, 1, 250)])
@pytest.mark.usefixtures("poisoned_memory")
def test_turns_and_turns_back(T, H, d, rotary, dtype):
    x, turns = torch.randn(2, T, H, d, dtype=dtype), angles(T, d).values()
    eps = torch.finfo(dtype).eps
    found, expected = turn(strided(x), *turns, rotary), apply_rotary(x.double(), *turns, rotary)
    assert found.is_contiguous() and found.dtype == dtype
    bound = 4 * eps * x.abs().max().item()
    assert (found - pairs_apart(expected, rotary)).abs().max() <= bound
    back = turn_back(strided(pairs_apart(x, rotary)), *turns, rotary)
    cos, sin = turns
    assert (back - apply_rotary(x.double(), cos, -sin, rotary)).abs().max() <= bound


def test_none_and_no_rows():
    x, turns = torch.randn(2, 3, 1, 4), angles(3, 4).values()
    assert turn(x, None, None, "none") is x and turn_back(x, None, None, "none") is x
    assert turn(x[:0], *turns, "half").shape == turn_back(x[:0], *turns, "half").shape == (0, 3, 1, 4)


@every_dtype
@pytest.mark.parametrize("rotary", ["none", "interleaved", "half"])
def test_torchs_fused_attention_behind_it(rotary, dtype):
    tensors, seeds = inputs(2, 65, 4, 2, 24, dtype), (torch.randn(2, 65, 4, 24, dtype=dtype),)
    options = rotary_options(rotary, 65, 24, torch.float32)
    plain = with_gradients(lambda *t: [naive(*t, **options)[0]], tensors, seeds)
    exact = with_gradients(lambda *t: [naive(*t, **options)[0]], [t.double() for t in tensors], seeds)
    found = with_gradients(lambda *t: [causal_attention(*t, **options, backend="sdpa")], tensors, seeds)
    for values in zip(found, plain, exact):
        assert_within_contract(*values)
