"""residual_norm: a sum and the norm behind it."""

from __future__ import annotations

import pytest
import torch
from support.backends import cpu_backends
from support.contract import assert_same_row, compiled, with_gradients
from support.residual_norm import PARTS, check_contract, every_kind, every_part, inputs, naive, only, op, spread

from starflow_kernels import residual_norm

F64 = torch.float64


@pytest.fixture(params=cpu_backends("residual_norm"))
def backend(request):
    return request.param


@every_kind
@every_part
@pytest.mark.parametrize("eps", [None, 0.1])
def test_matches_torch(parts, kind, eps, backend):
    tensors, seeds = only(parts, inputs()), torch.randn(2, 2, 5, 7, dtype=F64)
    found = with_gradients(op(parts, kind, backend, eps=eps), tensors, seeds)
    torch.testing.assert_close(found, with_gradients(naive(parts, kind, eps), tensors, seeds), rtol=1e-11, atol=1e-11)


@every_kind
@every_part
def test_gradcheck(parts, kind, backend):
    tensors = [t.requires_grad_() for t in only(parts, inputs(T=2, C=4))]
    assert torch.autograd.gradcheck(op(parts, kind, backend), tensors)
    for output in range(2):
        assert torch.autograd.gradcheck(lambda *t: op(parts, kind, backend)(*t)[output], tensors)  # noqa: B023


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_contract(dtype, kind, backend):
    check_contract(inputs(T=63, C=40, dtype=dtype), PARTS[0], kind, backend)


def test_a_residual_and_weights_of_other_dtypes(backend):
    x, residual, weight, bias = inputs(T=9, dtype=torch.float32)
    check_contract([x, residual.bfloat16(), weight, bias.half()], PARTS[0], "layer_norm", backend)
    check_contract([x.bfloat16(), residual, weight, bias], PARTS[0], "rms_norm", backend)


def test_without_a_residual_the_sum_is_x(backend):
    x, *_ = inputs()
    assert residual_norm(x, backend=backend)[0] is x


@every_kind
def test_bits_of_a_row(kind, backend):
    tensors, seeds = inputs(B=9, T=7, C=33, dtype=torch.float32), torch.randn(2, 9, 7, 33)

    def run(i):
        given = [t[i] for t in tensors[:2]] + tensors[2:]
        return with_gradients(op(PARTS[0], kind, backend), given, [s[i] for s in seeds])

    batch = run(slice(None))
    for rows in (slice(0, 1), slice(3, 5)):
        for alone, batched in zip(run(rows)[:4], batch):
            assert_same_row(backend, alone, batched[rows])


def test_no_rows(backend):
    tensors = inputs(B=0)
    results = with_gradients(op(PARTS[0], "layer_norm", backend), tensors, torch.zeros(2, 0, 5, 7))
    assert [r.shape for r in results] == [(0, 5, 7)] * 4 + [(7,)] * 2
    assert not any(r.any() for r in results)


@every_kind
@every_part
def test_opcheck(parts, kind):
    tensors = spread(parts, only(parts, inputs()))
    options = kind, 1e-5
    outputs = list(torch.ops.starflow.residual_norm(*tensors, *options))
    grads = [torch.randn_like(t) for t in outputs]
    args = tensors[0], None, *tensors[2:]
    torch.library.opcheck(torch.ops.starflow.residual_norm_backward.default, (grads, outputs, *args, *options))
    tensors = [None if t is None else t.requires_grad_() for t in tensors]
    torch.library.opcheck(torch.ops.starflow.residual_norm.default, (*tensors, *options))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(compiler):
    tensors, seeds = inputs(), torch.randn(2, 2, 5, 7, dtype=F64)
    run = op(PARTS[0], "rms_norm", None)
    eager, graph = (with_gradients(f, tensors, seeds) for f in (run, compiled(run, compiler)))
    torch.testing.assert_close(graph, eager, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": None}, TypeError, "x: expected a tensor"),
        ({"x": torch.zeros(3, 4)}, ValueError, r"x: expected shape \(B, T, C\), got \(3, 4\)"),
        ({"residual": torch.zeros(2, 3, 1)}, ValueError, r"residual: expected shape \(2, 3, 4\)"),
        ({"weight": torch.zeros(3)}, ValueError, r"weight: expected shape \(4,\)"),
        ({"bias": torch.zeros(4, device="meta")}, ValueError, "bias: on meta, expected cpu"),
        ({"kind": "batch_norm"}, ValueError, "kind='batch_norm': expected one of 'layer_norm', 'rms_norm'"),
        ({"eps": -1.0}, ValueError, "eps=-1.0"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        residual_norm(**{"x": torch.zeros(2, 3, 4), **change})
