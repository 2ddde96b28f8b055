"""linear: the layer of training and its gradient."""

from __future__ import annotations

import pytest
import torch
from support.backends import cpu_backends, needs_native
from support.bindings import Recorded
from support.contract import assert_same_row, assert_within_contract, compiled, strided, with_gradients

from starflow_kernels import linear
from starflow_kernels.linear import native

F64 = torch.float64
SIZES = [(1, 1, 1, 1), (3, 2, 8, 24), (1, 63, 80, 17), (2, 111, 33, 64), (2, 1024, 771, 64), (1, 65, 1537, 130)]


@pytest.fixture(params=cpu_backends("linear"))
def backend(request):
    return request.param


def inputs(B=2, T=5, K=7, N=3, bias=True, dtype=F64) -> list[torch.Tensor]:
    shapes = [(B, T, K), (N, K), *([(N,)] if bias else [])]
    return [torch.randn(shape, dtype=F64).to(dtype) for shape in shapes]


def naive(x, weight, bias=None):
    y = torch.einsum("btk,nk->btn", x, weight)
    return (y if bias is None else y + bias,)


@pytest.mark.parametrize("bias", [False, True])
def test_matches_loops(bias):
    tensors = inputs(bias=bias)
    torch.testing.assert_close(linear(*tensors), *naive(*tensors), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(bias):
    assert torch.autograd.gradcheck(linear, [t.requires_grad_() for t in inputs(bias=bias)])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("B, T, K, N", SIZES)
def test_error_contract(B, T, K, N, bias, backend):
    single = inputs(B, T, K, N, bias, torch.float32)
    seeds = [torch.randn(B, T, N)]
    exact = with_gradients(naive, [t.double() for t in single], seeds)
    plain = with_gradients(lambda *t: (torch.nn.functional.linear(*t),), single, seeds)
    actual = with_gradients(lambda *t: (linear(*t, backend=backend),), [strided(t) for t in single], seeds)
    for a, p, e in zip(actual, plain, exact, strict=True):
        assert a.dtype == torch.float32 and a.shape == e.shape
        assert_within_contract(a, p, e)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("B, T, K, N", SIZES)
def test_gradient_of_the_input_alone(B, T, K, N, bias, backend):
    """The gradient is the one that comes with those of the weights, and the input is not kept for it."""
    x, *weights = inputs(B, T, K, N, bias, torch.float32)
    seed, gradients, kept = torch.randn(B, T, N), [], []
    for trained in (False, True):
        leaves = [x.clone().requires_grad_(), *(w.clone().requires_grad_(trained) for w in weights)]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
            y = linear(*leaves, backend=backend)
        gradients.append(torch.autograd.grad(y, leaves[0], seed)[0])
    assert_same_row(backend, *gradients)
    assert kept[: len(weights)] == [w.shape for w in weights] and kept[len(weights)] == x.shape


@needs_native
@pytest.mark.parametrize("leaf", [False, True])
def test_gradients_of_weights_are_computed_only_if_asked_for(leaf, monkeypatch):
    x, weight, bias = (t.requires_grad_() for t in inputs(dtype=torch.float32))
    ops = Recorded(torch.ops.starflow_native)
    monkeypatch.setattr(torch.ops, "starflow_native", ops)
    y = linear(x if leaf else 2 * x, weight, bias, backend="native").square().sum()
    (alone,) = torch.autograd.grad(y, x, retain_graph=True)
    assert "linear_backward" not in ops.calls
    both = torch.autograd.grad(y, [x, weight], retain_graph=True)
    assert "linear_backward" in ops.calls and torch.equal(both[0], alone)


def test_second_derivative_of_the_input_alone():
    x, *weights = inputs()
    assert torch.autograd.gradgradcheck(lambda x: linear(x, *weights).pow(3), x.requires_grad_())


@pytest.mark.parametrize("bias", [False, True])
def test_no_rows(bias):
    single = inputs(0, 4, 5, 6, bias, torch.float32)
    y, *grads = with_gradients(lambda *t: (linear(*t),), single, [torch.zeros(0, 4, 6)])
    assert y.shape == (0, 4, 6) and [g.shape for g in grads] == [t.shape for t in single]
    assert not any(g.any() for g in grads)


def test_writes_all_of_its_outputs(poisoned_memory, backend):
    single = inputs(dtype=torch.float32)
    found = with_gradients(lambda *t: (linear(*t, backend=backend),), single, [torch.ones(2, 5, 3)])
    assert all(t.isfinite().all() for t in found)


@needs_native
@pytest.mark.parametrize("first, last", [(0, 70), (7, 77), (30, 100)])
def test_an_output_among_other_channels_has_the_bits_of_one_alone(first, last):
    x, weight, bias = inputs(3, 20, 300, 70, dtype=torch.float32)
    out = torch.full((3, 20, 100), 7.0)
    native.linear_into(out[..., first:last], x, weight, bias)
    expected = linear(x, weight, bias, backend="native")
    assert torch.equal(out[..., first:last], expected)
    assert (out[..., :first] == 7).all() and (out[..., last:] == 7).all()
    native.linear_into(out[..., first:last], x, weight, bias, sigmoid=True)
    torch.testing.assert_close(out[..., first:last], expected.sigmoid(), rtol=1e-6, atol=1e-7)
    assert (out[..., :first] == 7).all() and (out[..., last:] == 7).all()


@needs_native
def test_outputs_do_not_overlap():
    x, weight, bias = inputs(dtype=torch.float32)
    with pytest.raises(RuntimeError, match="rows of a result overlap"):
        native.linear_into(torch.zeros(3).expand(2, 5, 3), x, weight, bias)


@needs_native
def test_bits_of_a_row_are_its_own():
    x, weight, bias = (t.requires_grad_() for t in inputs(3, 50, 300, 70, dtype=torch.float32))
    y = linear(x, weight, bias, backend="native")
    alone = x[1:2, 20:21].detach().requires_grad_()
    row = linear(alone, weight, bias, backend="native")
    assert torch.equal(y[1:2, 20:21], row)
    grad = torch.randn_like(y)
    (whole,) = torch.autograd.grad(y, x, grad)
    (part,) = torch.autograd.grad(row, alone, grad[1:2, 20:21])
    assert torch.equal(whole[1:2, 20:21], part)


def test_opcheck(backend):
    tensors = inputs(dtype=torch.float32)
    gradient, grads = torch.ops.starflow.linear_backward.default, [torch.randn(2, 5, 3)]
    torch.library.opcheck(gradient, (grads, [], *tensors), {"backend": backend})
    tensors = [t.requires_grad_() for t in tensors]
    torch.library.opcheck(torch.ops.starflow.linear.default, tensors, {"backend": backend})


def test_compiles_as_one_graph(backend):
    tensors = [t.requires_grad_() for t in inputs(dtype=torch.float32)]
    run = lambda *t: linear(*t, backend=backend)  # noqa: E731
    assert torch.equal(compiled(run)(*tensors), run(*tensors))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({0: torch.randn(2, 5)}, ValueError, r"x: expected shape \(B, T, in\)"),
        ({1: torch.randn(3, 8)}, ValueError, r"weight: expected shape \(out, 7\)"),
        ({2: torch.randn(4)}, ValueError, r"bias: expected shape \(3,\)"),
        ({1: torch.randn(3, 7).half()}, TypeError, "weight: dtype torch.float16"),
        ({0: None}, TypeError, "x: expected a tensor"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    tensors = inputs(dtype=torch.float32)
    for index, value in change.items():
        tensors[index] = value
    with pytest.raises(error, match=message):
        linear(*tensors)


@needs_native
@pytest.mark.parametrize(
    "B, dtype, reason",
    [
        (2, F64, "x is torch.float64, it takes float32"),
        (2, torch.bfloat16, "x is torch.bfloat16, it takes float32"),
        (0, torch.float32, "there is nothing to multiply"),
    ],
    ids=str,
)
def test_native_refuses_with_the_reason(B, dtype, reason):
    with pytest.raises(ValueError, match=f"backend='native' cannot run linear: {reason}"):
        linear(*inputs(B, dtype=dtype), backend="native")
