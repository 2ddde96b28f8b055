"""bias_gelu in Triton's interpreter: TRITON_INTERPRET=1 pytest tests/kernels/test_bias_gelu_triton.py."""

from __future__ import annotations

import importlib

import pytest
import torch
from support.backends import require_interpreter
from support.bias_gelu import check_contract, every_part, inputs, op
from support.contract import compiled, with_gradients

require_interpreter()


@every_part
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("T, C", [(1, 1), (9, 3), (13, 128), (4, 129), (3, 1000)])
@pytest.mark.usefixtures("poisoned_memory")
def test_error_contract(T, C, dtype, bias):
    check_contract(inputs(bias, 2, T, C, dtype), "triton")


@pytest.mark.parametrize("shares", [1, 3])
@pytest.mark.usefixtures("poisoned_memory")
def test_programs_that_take_several_blocks_of_rows(shares, monkeypatch):
    monkeypatch.setattr(importlib.import_module("starflow_kernels.bias_gelu.triton"), "SHARES", shares)
    check_contract(inputs(True, 2, 37, 40, torch.float32), "triton")


@pytest.mark.usefixtures("poisoned_memory")
def test_large_values_and_a_bias_of_another_dtype():
    x, bias = inputs(dtype=torch.float32)
    check_contract([x.half(), bias], "triton")
    check_contract([1e4 * x, bias], "triton")


def test_a_row_has_the_same_bits_alone():
    (x, bias), seed = inputs(B=5, T=9, C=33, dtype=torch.float32), torch.randn(5, 9, 33)
    batch, again = (with_gradients(op("triton"), [x, bias], [seed]) for _ in range(2))
    assert all(torch.equal(*values) for values in zip(batch, again))
    for rows in (slice(0, 1), slice(2, 4)):
        for alone, batched in zip(with_gradients(op("triton"), [x[rows], bias], [seed[rows]])[:2], batch):
            assert torch.equal(alone, batched[rows])


def test_no_rows():
    results = with_gradients(op("triton"), inputs(B=0, dtype=torch.float32), [torch.zeros(0, 5, 7)])
    assert [r.shape for r in results] == [(0, 5, 7), (0, 5, 7), (7,)]
    assert not any(r.any() for r in results)


@every_part
def test_opcheck_and_compile(bias):
    tensors = inputs(bias, dtype=torch.float32)
    args = (*(t.clone().requires_grad_() for t in tensors), None)[:2]
    torch.library.opcheck(torch.ops.starflow.bias_gelu.default, args, {"backend": "triton"})
    eager, graph = (with_gradients(f, tensors, [torch.randn(2, 5, 7)]) for f in (op("triton"), compiled(op("triton"))))
    assert torch.equal(eager[0], graph[0])
