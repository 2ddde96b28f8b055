"""bias_gelu: exact GELU behind a bias."""

from __future__ import annotations

import pytest
import torch
from support.backends import cpu_backends
from support.bias_gelu import check_contract, every_part, inputs, naive, op
from support.contract import assert_same_row, compiled, with_gradients

from starflow_kernels import bias_gelu

F64 = torch.float64


@pytest.fixture(params=cpu_backends("bias_gelu"))
def backend(request):
    return request.param


@every_part
def test_matches_torch(bias, backend):
    tensors, seeds = inputs(bias), [torch.randn(2, 5, 7, dtype=F64)]
    found = with_gradients(op(backend), tensors, seeds)
    torch.testing.assert_close(found, with_gradients(naive, tensors, seeds), rtol=1e-12, atol=1e-12)


@every_part
def test_gradcheck(bias, backend):
    assert torch.autograd.gradcheck(op(backend), [t.requires_grad_() for t in inputs(bias, T=2, C=3)])


@every_part
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_contract(dtype, bias, backend):
    check_contract(inputs(bias, T=63, C=40, dtype=dtype), backend)


def test_a_bias_of_another_dtype(backend):
    x, bias = inputs(dtype=torch.float32)
    check_contract([x.bfloat16(), bias], backend)


def test_bits_of_a_row(backend):
    (x, bias), seed = inputs(B=9, C=33, dtype=torch.float32), torch.randn(9, 5, 33)
    batch = with_gradients(op(backend), [x, bias], [seed])
    for rows in (slice(0, 1), slice(3, 5)):
        for alone, batched in zip(with_gradients(op(backend), [x[rows], bias], [seed[rows]])[:2], batch):
            assert_same_row(backend, alone, batched[rows])


@every_part
def test_opcheck(bias):
    x, bias = (*inputs(bias), None)[:2]
    backward = torch.ops.starflow.bias_gelu_backward.default
    torch.library.opcheck(backward, ([torch.randn_like(x)], [], x, bias))
    args = x.requires_grad_(), None if bias is None else bias.requires_grad_()
    torch.library.opcheck(torch.ops.starflow.bias_gelu.default, args)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(compiler):
    tensors, seeds = inputs(), [torch.randn(2, 5, 7, dtype=F64)]
    eager, graph = (with_gradients(f, tensors, seeds) for f in (op(None), compiled(op(None), compiler)))
    torch.testing.assert_close(graph, eager, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "x, bias, error, message",
    [
        (None, None, TypeError, "x: expected a tensor"),
        (torch.zeros(3, 4), None, ValueError, r"x: expected shape \(B, T, C\), got \(3, 4\)"),
        (torch.zeros(2, 3, 4), torch.zeros(3), ValueError, r"bias: expected shape \(4,\)"),
    ],
)
def test_errors_name_the_argument(x, bias, error, message):
    with pytest.raises(error, match=message):
        bias_gelu(x, bias)
