"""The rotation before a fused attention, in Triton: TRITON_INTERPRET=1 pytest tests/kernels/test_external_triton.py."""

from __future__ import annotations

import pytest
import torch
from support.backends import require_interpreter
from support.causal_attention import inputs, naive, rotary_options
from support.contract import assert_within_contract, strided, with_gradients
from support.naive import angles

from starflow_kernels import causal_attention
from starflow_kernels._core import numerics
from starflow_kernels.causal_attention import external

require_interpreter()
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


def pairs_apart(x: torch.Tensor, rotary: str) -> torch.Tensor:
    return torch.cat([x[..., 0::2], x[..., 1::2]], -1) if rotary == "interleaved" else x


@every_dtype
@pytest.mark.parametrize("rotary", ["interleaved", "half"])
@pytest.mark.parametrize("T, H, d", [(1, 1, 2), (65, 3, 24), (64, 2, 80), (33, 1, 250)])
@pytest.mark.usefixtures("poisoned_memory")
def test_applies_and_undoes_the_rotation(T, H, d, rotary, dtype):
    x, (cos, sin) = torch.randn(2, T, H, d, dtype=dtype), angles(T, d).values()
    bound = 4 * torch.finfo(dtype).eps * x.abs().max().item()
    rotated = external.apply_rotary(strided(x), cos, sin, rotary)
    assert rotated.is_contiguous() and rotated.dtype == dtype
    expected = pairs_apart(numerics.apply_rotary(x.double(), cos, sin, rotary), rotary)
    assert (rotated - expected).abs().max() <= bound
    undone = external.undo_rotary(strided(pairs_apart(x, rotary)), cos, sin, rotary)
    assert (undone - numerics.apply_rotary(x.double(), cos, -sin, rotary)).abs().max() <= bound


def test_none_and_no_rows():
    x, (cos, sin) = torch.randn(2, 3, 1, 4), angles(3, 4).values()
    for rotate in (external.apply_rotary, external.undo_rotary):
        assert rotate(x, None, None, "none") is x
        assert rotate(x[:0], cos, sin, "half").shape == (0, 3, 1, 4)


@every_dtype
@pytest.mark.parametrize("rotary", ["none", "interleaved", "half"])
def test_torchs_fused_attention_after_it(rotary, dtype):
    tensors, seeds = inputs(2, 65, 4, 2, 24, dtype), (torch.randn(2, 65, 4, 24, dtype=dtype),)
    options = rotary_options(rotary, 65, 24, torch.float32)
    plain = with_gradients(lambda *t: [naive(*t, **options)[0]], tensors, seeds)
    exact = with_gradients(lambda *t: [naive(*t, **options)[0]], [t.double() for t in tensors], seeds)
    found = with_gradients(lambda *t: [causal_attention(*t, **options, backend="sdpa")], tensors, seeds)
    for values in zip(found, plain, exact):
        assert_within_contract(*values)
