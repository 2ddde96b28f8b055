"""block_layer: a whole transformer layer of a block in training, and its gradient."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.backends import cpu_backends, needs_native
from support.bindings import Recorded
from support.blocks import BLOCKS, F64, block, passes
from support.contract import assert_same_row, assert_within_contract, compiled, with_gradients
from support.naive import angles

from starflow_kernels import BlockSpec
from starflow_kernels._core.registration import call
from starflow_kernels.block import layer

SPECS = {
    "layer_norm": BlockSpec(token_dim=3, channels=40, layers=2, heads=4, head_dim=8, kv_heads=2, mlp_dim=72),
    "rms_norm": BlockSpec(
        token_dim=3, channels=33, layers=1, heads=3, head_dim=16, kv_heads=3, mlp_dim=50, norm="rms_norm", rotary="half"
    ),
    "no-norm-no-bias": BlockSpec(
        token_dim=3, channels=64, layers=1, heads=1, head_dim=64, kv_heads=1, mlp_dim=130, norm="none", bias=False
    ),
    "whole-vectors": BlockSpec(token_dim=3, channels=128, layers=1, heads=2, head_dim=64, kv_heads=2, mlp_dim=512),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


@pytest.fixture(params=cpu_backends("block_layer"))
def backend(request):
    return request.param


def inputs(spec, B=2, T=5, dropout=True, dtype=F64):
    """Return states and weights, None where the layer has none, and the arguments of the op behind them."""
    weights = []
    for name in layer.NAMES:
        shape = spec.weight_shapes.get(f"layers.0.{name}")
        scale = shape[1] ** -0.5 if shape and len(shape) == 2 else 0.3
        weights.append(None if shape is None else (torch.randn(shape, dtype=F64) * scale).to(dtype))
    table = angles(T, spec.head_dim, dtype) if spec.rotary != "none" else {"cos": None, "sin": None}
    drops = [(torch.rand(B, T, spec.channels, dtype=F64) < 0.9).to(dtype) / 0.9 if dropout else None for _ in range(2)]
    h = torch.randn(B, T, spec.channels, dtype=F64).to(dtype)
    return [h, *weights], [table["cos"], table["sin"], *drops, spec.to_json()]


def results(tensors, options, backend, grad):
    """Return the states after the layer, and the gradients of all tensors that are given."""
    given = [i for i, t in enumerate(tensors) if t is not None]

    def run(*values):
        every = list(tensors)
        for i, value in zip(given, values):
            every[i] = value
        return call("block_layer", *every, *options, backend=backend)[:1]

    return with_gradients(run, [tensors[i] for i in given], [grad])


def in_double(values):
    return [v.double() if isinstance(v, torch.Tensor) else v for v in values]


@needs_native
@every_spec
@pytest.mark.parametrize("B, T, dropout", [(1, 1, False), (3, 7, True), (2, 130, False), (9, 256, True)])
def test_error_contract(spec, B, T, dropout):
    tensors, options = inputs(spec, B, T, dropout, torch.float32)
    grad = torch.randn_like(tensors[0])
    exact = results(in_double(tensors), in_double(options), "reference", grad)
    plain = results(tensors, options, "reference", grad)
    for found in zip(results(tensors, options, "native", grad), plain, exact, strict=True):
        assert_within_contract(*found)


@every_spec
def test_gradcheck(spec):
    tensors, options = inputs(dataclasses.replace(spec, channels=6, mlp_dim=5), T=2)
    given = [t.requires_grad_() for t in tensors if t is not None]

    def run(*values):
        values = iter(values)
        every = [None if t is None else next(values) for t in tensors]
        return call("block_layer", *every, *options, backend="reference")[0]

    assert torch.autograd.gradcheck(run, given, fast_mode=True)


@every_spec
def test_bits_of_a_row(spec, backend):
    tensors, options = inputs(spec, 9, 61, dtype=torch.float32)
    grad = torch.randn_like(tensors[0])
    batch = results(tensors, options, backend, grad)[:2]
    for rows in (slice(0, 1), slice(3, 5)):
        own = [*options[:2], *(drop[rows] for drop in options[2:4]), options[4]]
        for alone, batched in zip(results([tensors[0][rows], *tensors[1:]], own, backend, grad[rows])[:2], batch):
            assert_same_row(backend, alone, batched[rows])


@needs_native
@every_spec
def test_bits_at_any_number_of_threads(spec):
    tensors, options = inputs(spec, 9, 130, dtype=torch.float32)
    grad, threads = torch.randn_like(tensors[0]), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(results(tensors, options, "native", grad))
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(map(torch.equal, others, found[0]))


def test_opcheck(backend):
    tensors, options = inputs(SPECS["rms_norm"], dtype=torch.float32)
    outputs = list(torch.ops.starflow.block_layer(*tensors, *options, backend=backend))
    arguments = [torch.randn_like(outputs[0]), None], outputs, *tensors, *options
    backward, utils = torch.ops.starflow.block_layer_backward.default, ("test_schema", "test_faketensor")
    # The modes of these checks do not work inside of torch.func, which the reference uses.
    if backend == "native":
        torch.library.opcheck(backward, arguments, {"backend": backend}, test_utils=utils)
    tensors = [None if t is None else t.requires_grad_() for t in tensors]
    torch.library.opcheck(torch.ops.starflow.block_layer.default, (*tensors, *options), {"backend": backend})


def test_writes_all_of_its_gradients(poisoned_memory, backend):
    tensors, options = inputs(SPECS["layer_norm"], dtype=torch.float32)
    assert all(t.isfinite().all() for t in results(tensors, options, backend, torch.ones_like(tensors[0])))


def test_compiles_as_one_graph(backend):
    tensors, options = inputs(SPECS["layer_norm"], dtype=torch.float32)
    grad = torch.randn_like(tensors[0])

    def run(*tensors):
        return call("block_layer", *tensors, *options, backend=backend)[:1]

    for found, expected in zip(with_gradients(compiled(run), tensors, [grad]), with_gradients(run, tensors, [grad])):
        assert torch.equal(found, expected)


@needs_native
@pytest.mark.parametrize("case", ["tarflow-flip", "tarflow-rms-clip", "tarflow-text", "starflow-grouped"])
def test_a_trained_block_uses_it(case, monkeypatch):
    ops = Recorded(torch.ops.starflow_native)
    monkeypatch.setattr(torch.ops, "starflow_native", ops)
    x, w, spec, context = block(BLOCKS[case], dtype=torch.float32)
    found = passes(x, w, spec, context)
    assert {"block_layer", "block_layer_backward"} <= ops.calls.keys()
    exact = passes(
        *in_double([x]), {n: t.double() for n, t in w.items()}, spec, {n: t.double() for n, t in context.items()}
    )
    # Errors of the ops, each within the contract, add up.
    for actual, expected in zip(found, exact, strict=True):
        assert (actual - expected).abs().max() <= 32 * torch.finfo(torch.float32).eps * expected.abs().max()


@needs_native
@pytest.mark.parametrize("case", ["tarflow-swiglu", "starflow-all-norms", "adaptive"])
def test_other_layers_are_composed(case, monkeypatch):
    ops = Recorded(torch.ops.starflow_native)
    monkeypatch.setattr(torch.ops, "starflow_native", ops)
    passes(*block(BLOCKS[case], dtype=torch.float32))
    assert "linear_backward" in ops.calls and "block_layer" not in ops.calls


@needs_native
def test_dropout_draws_the_factors_of_torch():
    x, w, spec, context = block(BLOCKS["tarflow"], dtype=torch.float32)
    found = []
    for backend in (None, "reference"):
        torch.manual_seed(3)
        found.append(passes(x, w, spec, context, dropout=0.4, backend=backend))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
