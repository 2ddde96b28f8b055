"""residual_norm in Triton's interpreter: TRITON_INTERPRET=1 pytest tests/kernels/test_residual_norm_triton.py."""

from __future__ import annotations

import importlib

import pytest
import torch
from support.backends import require_interpreter
from support.contract import compiled, with_gradients
from support.residual_norm import PARTS, check_contract, every_kind, every_part, inputs, only, op, spread

from starflow_kernels import residual_norm

require_interpreter()


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("B, T, C", [(70, 1, 1), (2, 33, 3), (2, 65, 40), (2, 7, 1024), (2, 3, 1025), (2, 1, 5000)])
@pytest.mark.usefixtures("poisoned_memory")
def test_error_contract(B, T, C, dtype, kind):
    """The norm of a row of one value has a gradient without digits, so many rows are compared at once."""
    for parts in PARTS[: 5 if C < 1024 else 1]:
        check_contract(inputs(B, T, C, dtype), parts, kind, "triton")


@every_kind
@pytest.mark.parametrize("shares", [1, 3])
@pytest.mark.usefixtures("poisoned_memory")
def test_programs_that_take_several_blocks_of_rows(shares, kind, monkeypatch):
    monkeypatch.setattr(importlib.import_module("starflow_kernels.residual_norm.triton"), "SHARES", shares)
    check_contract(inputs(2, 73, 40, torch.float32), PARTS[0], kind, "triton")


@pytest.mark.usefixtures("poisoned_memory")
def test_mixed_dtypes():
    x, residual, weight, bias = inputs(T=9, dtype=torch.float32)
    check_contract([x, residual.half(), weight, bias.half()], PARTS[0], "layer_norm", "triton")
    check_contract([x.half(), residual, weight, bias], PARTS[0], "rms_norm", "triton")


@every_kind
def test_a_row_has_the_same_bits_alone(kind):
    tensors, seeds = inputs(5, 41, 33, torch.float32), torch.randn(2, 5, 41, 33)

    def run(i):
        given = [t[i] for t in tensors[:2]] + tensors[2:]
        return with_gradients(op(PARTS[0], kind, "triton"), given, [s[i] for s in seeds])

    batch = run(slice(None))
    assert all(torch.equal(*values) for values in zip(batch, run(slice(None))))
    for rows in (slice(0, 1), slice(2, 4)):
        for alone, batched in zip(run(rows)[:4], batch):
            assert torch.equal(alone, batched[rows])


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_of_one_output_alone(used):
    tensors, seed = inputs(dtype=torch.float32), torch.randn(2, 5, 7)
    run = lambda backend: with_gradients(  # noqa: E731
        lambda *t: [op(PARTS[0], "layer_norm", backend)(*t)[used]], tensors, [seed]
    )
    torch.testing.assert_close(run("triton"), run("reference"), rtol=1e-5, atol=1e-5)


def test_no_rows():
    results = with_gradients(
        op(PARTS[0], "layer_norm", "triton"), inputs(B=0, dtype=torch.float32), torch.zeros(2, 0, 5, 7)
    )
    assert [r.shape for r in results] == [(0, 5, 7)] * 4 + [(7,)] * 2
    assert not any(r.any() for r in results)


def test_refuses_with_the_reason():
    with pytest.raises(ValueError, match="cannot run residual_norm: rows of 8193 values, it takes up to 8192"):
        residual_norm(torch.zeros(1, 1, 8193), backend="triton")


@every_part
def test_opcheck_and_compile(parts):
    tensors = only(parts, inputs(dtype=torch.float32))
    args = [None if t is None else t.clone().requires_grad_() for t in spread(parts, tensors)]
    torch.library.opcheck(torch.ops.starflow.residual_norm.default, (*args, "rms_norm", 1e-6), {"backend": "triton"})
    run, seeds = op(parts, "layer_norm", "triton"), torch.randn(2, 2, 5, 7)
    eager, graph = (with_gradients(f, tensors, seeds) for f in (run, compiled(run)))
    assert all(torch.equal(*values) for values in zip(eager, graph))
