"""The native ops check every tensor that they read or write, so that a wrong call cannot corrupt memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.backends import needs_native
from support.bindings import Recorded, assert_checked
from support.blocks import STARFLOW, tame_block
from support.masked import masked_layers
from support.naive import angles

import starflow_kernels as ops
from starflow_kernels import BlockSpec, Solver
from starflow_kernels.masked_inverse.api import Univariate

pytestmark = needs_native
LIBRARY = "starflow_native::"
SPEC = BlockSpec(
    token_dim=3, channels=24, layers=2, heads=4, head_dim=8, kv_heads=2, mlp_dim=40, text_dim=6, positions=8, **STARFLOW
)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, requires_grad=True)


def attend() -> None:
    q, k, v = randn(2, 6, 4, 8), randn(2, 6, 2, 8), randn(2, 6, 2, 8)
    options = {"rotary": "half", "backend": "native"}
    out, lse = ops.causal_attention(q, k, v, **angles(6, 8, torch.float32), **options, return_lse=True)
    (out.sum() + lse.sum()).backward()
    caches = [torch.zeros(2, 10, 2, 8) for _ in range(2)]
    lengths = torch.tensor([1, 3], dtype=torch.int32)
    ops.cached_attention(q, k, v, *caches, lengths, **angles(10, 8, torch.float32), **options)


def transform() -> None:
    x, params, h = randn(2, 6, 4), randn(2, 6, 8), randn(2, 6, 10)
    for logdet in ("none", "sum"):
        z, logdets = ops.affine_flow(x, params, logdet=logdet, backend="native")
        (z.sum() + logdets.sum()).backward()
    z, logdets = ops.flow_head(x, h, randn(8, 10), randn(8), norm_weight=randn(10), backend="native")
    (z.sum() + logdets.sum()).backward()
    both, guidance = torch.randn(4, 6, 8), torch.ones(2, 6)
    ops.affine_flow_inverse(x.detach(), both, guidance=guidance, backend="native")
    ops.linear(randn(2, 6, 4), randn(5, 4), randn(5), backend="native").sum().backward()


def run_block() -> None:
    x, weights, context = tame_block(SPEC, 4, 8, 5, copies=2)
    half = {name: t if name in ("cos", "sin") else t[:4] for name, t in context.items()}
    ops.block_forward(x, weights, SPEC, **half, backend="native")


def train_block() -> None:
    spec = dataclasses.replace(SPEC, mlp="gelu", qk_norm=False, post_norm=False)
    x, weights, context = tame_block(spec, 4, 8, 5)
    weights = {name: weight.requires_grad_() for name, weight in weights.items()}
    z, logdet = ops.block_forward(x, weights, spec, **context, dropout=0.5)
    (z.sum() + logdet.sum()).backward()


def run_sampling() -> None:
    x, weights, context = tame_block(SPEC, 4, 8, 5, copies=2)
    ops.block_inverse(x, weights, SPEC, **context, guidance=0.5, backend="native")


def run_stack() -> None:
    x, weights, context = tame_block(SPEC, 4, 8, 5, copies=2)
    ops.stack_inverse(x, [(weights, SPEC, {**context, "guidance": 0.5})] * 2, backend="native")


def run_jacobi() -> None:
    x, weights, context = tame_block(SPEC, 4, 8, copies=2)
    solver = Solver("jacobi", window=6, neighbours=(1, 2))
    ops.block_inverse(x, weights, SPEC, **context, guidance=0.5, solver=solver, backend="native")


def run_gradient_of_sampling() -> None:
    x, weights, context = tame_block(SPEC, 4, 8, 5)
    known = torch.tensor([0, 2, 8, 1])
    found = ops.block_inverse(x.requires_grad_(), weights, SPEC, **context, data=x.detach(), known=known)
    found.x.sum().backward()


def run_masked() -> None:
    transform, order = Univariate("spline_softmax", bins=4), torch.tensor([2, 0, 1])
    layers = masked_layers(order, transform, B=5, residual=True, per_sample=True)
    ops.masked_inverse(torch.randn(5, 3, dtype=torch.float64), layers, order, transform, backend="native")


def describe() -> None:
    torch.ops.starflow_native.elementary(torch.ones(3), 0, torch.ones(3))


RUNS = (
    attend, transform, run_block, train_block, run_sampling, run_stack, run_jacobi, run_gradient_of_sampling,
    run_masked, describe,
)  # fmt: skip


@pytest.fixture
def recorded(monkeypatch) -> Recorded:
    """Return the native ops, which keep their calls."""
    ops = Recorded(torch.ops.starflow_native)
    monkeypatch.setattr(torch.ops, "starflow_native", ops)
    return ops


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_every_argument_of_a_call_is_checked(run, recorded):
    run()
    # They take any number of places or values, and say whether weights fit.
    for op in ("fingerprint", "fingerprints", "all_finite"):
        recorded.calls.pop(op, None)
    assert recorded.calls
    for op, args in recorded.calls.values():
        assert_checked(op, args)


def test_every_op_with_tensors_is_called_here(recorded):
    for run in RUNS:
        run()
    schemas = {op: torch._C._get_schema(op, "") for op in torch._C._dispatch_get_all_op_names() if LIBRARY in op}
    taking = {op.removeprefix(LIBRARY) for op, schema in schemas.items() if "Tensor" in str(schema)}
    assert taking - recorded.calls.keys() == {"use_huge_pages"}


def place_of(name, op) -> int:
    """Return the number of an argument."""
    return [argument.name for argument in op._schema.arguments].index(name)


@pytest.mark.parametrize(
    "index, value",
    [(0, 0), (1, 0), (2, 0), (3, 3), (4, 0), (5, 3), (6, 0), (7, 7), (8, -1), (16, 2), (17, 3), (18, 3), (19, 3)],
)
def test_a_spec_that_no_block_has_is_refused(index, value, recorded):
    run_sampling()
    op, args = recorded.calls["block_run"]
    args = list(args)
    place = place_of("spec", op)
    args[place] = [*args[place][:index], value, *args[place][index + 1 :]]
    with pytest.raises((RuntimeError, ValueError)):
        op(*args)


@pytest.mark.parametrize("offset", [-1, 2**62])
def test_an_offset_outside_of_the_weights_is_refused(offset, recorded):
    run_sampling()
    op, args = recorded.calls["block_run"]
    args = list(args)
    place = place_of("offsets", op)
    offsets = args[place]
    for i in range(len(offsets)):
        args[place] = [*offsets[:i], offset, *offsets[i + 1 :]]
        with pytest.raises((RuntimeError, ValueError), match="packed weights"):
            op(*args)


@pytest.mark.parametrize("index, value", [(0, -6), (1, 9), (2, 0), (2, 1000), (3, 0), (3, 1000), (4, 0), (4, 100)])
def test_a_plan_that_exceeds_the_tensors_is_refused(index, value, recorded):
    run_sampling()
    op, args = recorded.calls["block_run"]
    plan = list(args[-1])
    plan[index] = value
    with pytest.raises(RuntimeError, match=r"the plan does not fit|too small"):
        op(*args[:-1], plan)


@pytest.mark.parametrize("column, value", [(0, -1), (0, 9), (5, -1), (6, 9)])
def test_progress_outside_of_the_sequence_is_refused(column, value, recorded):
    run_jacobi()
    op, args = recorded.calls["block_jacobi"]
    args[place_of("places", op)][1, column] = value
    with pytest.raises(RuntimeError, match="the progress of a sequence is out of range"):
        op(*args)


@pytest.mark.parametrize("value", [-2, 2**40])
def test_a_number_of_a_masked_plan_that_is_out_of_range_is_refused(value, recorded):
    run_masked()
    op, args = recorded.calls["masked_inverse"]
    for i in range(args[1].numel()):
        plan = args[1].clone()
        plan[i] = value
        with pytest.raises(RuntimeError, match=r"the plan does not fit|too small"):
            op(args[0], plan, *args[2:])
