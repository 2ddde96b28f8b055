"""Blocks one after the other: the bits of single calls, and when one native call does all of it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.backends import needs_native
from support.blocks import STARFLOW, tame_block
from support.contract import compiled

from starflow_kernels import BlockSpec, Solver, block_inverse, stack_inverse
from starflow_kernels._core import compiled as loading
from starflow_kernels._core import dispatch
from starflow_kernels.block import native_stack
from starflow_kernels.block.packing import spec_fields

TOKENS = 9
SIZES = {"token_dim": 3, "channels": 24, "heads": 3, "head_dim": 8, "kv_heads": 3, "mlp_dim": 40}
SPECS = [
    BlockSpec(**SIZES, layers=2),
    BlockSpec(**SIZES, layers=1, flip=True),
    BlockSpec(**SIZES, **STARFLOW, layers=3, text_dim=6),
]
KINDS = {
    "plain": {},
    "guidance": {"guidance": 0.7, "temperature": 0.9},
    "guidance by token": {"guidance": torch.linspace(0, 2, TOKENS), "rule": "starflow"},
    "int8": {"quantize": "int8"},
}


def stack(B: int, T: int = TOKENS, dtype: torch.dtype = torch.float32, **options):
    """Return noise and blocks with a condition per row, per token and beside a text; the first one is not guided."""
    blocks = []
    for i, spec in enumerate(SPECS):
        own = {name: value for name, value in options.items() if i or name == "quantize"}
        own = {n: v[:T] if isinstance(v, torch.Tensor) else v for n, v in own.items()}
        z, weights, context = tame_block(spec, B, T, 4, dtype, 2 if "guidance" in own else 1)
        if spec.flip:
            context["cond"] = context["cond"][:, None] + 0.1 * torch.randn(1, T, 1).to(dtype)
        blocks.append((weights, spec, {**context, **own}))
    return z, blocks


def one_by_one(z, blocks, **options):
    """Return the result of `block_inverse` for each block."""
    found = []
    for weights, spec, own in reversed(blocks):
        found.insert(0, block_inverse(found[0].x if found else z, weights, spec, **own, **options))
    return found


def assert_same(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected):
        assert torch.equal(ours.x, theirs.x)
        assert torch.equal(ours.logdet, theirs.logdet)
        assert torch.equal(ours.report.sweeps, theirs.report.sweeps)
        assert (ours.report.passes, ours.report.tokens) == (theirs.report.passes, theirs.report.tokens)


@pytest.fixture
def whole(monkeypatch) -> list:
    """Return a list to which every call that runs all blocks natively is added."""
    made, run = [], native_stack.stack_inverse

    def counted(*arguments):
        found = run(*arguments)
        made.extend([] if found is None else [found])
        return found

    monkeypatch.setattr(native_stack, "stack_inverse", counted)
    return made


@needs_native
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("B, T, threads", [(1, TOKENS, 1), (3, TOKENS, 2), (70, TOKENS, 2), (2, 1, 2)])
def test_one_call_has_the_bits_of_single_calls(options, dtype, B, T, threads, whole):
    torch.set_num_threads(threads)
    z, blocks = stack(B, T, dtype, **options)
    before = z.clone()
    found = stack_inverse(z, blocks)
    assert len(whole) == 1
    assert_same(found, one_by_one(z, blocks))
    assert torch.equal(z, before)


@needs_native
def test_a_condition_in_the_own_order_has_the_bits_of_one_in_that_of_the_data(whole):
    z, blocks = stack(3)
    weights, spec, options = blocks[1]
    moved = (weights, spec, {**options, "cond": options["cond"].flip(1), "cond_in_order": True})
    found = stack_inverse(z, [blocks[0], moved, blocks[2]])
    assert len(whole) == 1 and spec.flip
    assert_same(found, one_by_one(z, blocks))


@needs_native
def test_noise_need_not_be_contiguous(whole):
    z, blocks = stack(3)
    found = stack_inverse(z.transpose(0, 1).contiguous().transpose(0, 1), blocks)
    assert len(whole) == 1
    assert_same(found, one_by_one(z, blocks))


@needs_native
def test_its_reports_have_the_seconds_of_each_block(whole):
    reports = [block.report for block in stack_inverse(*stack(3))]
    assert len(whole) == 1
    assert all(0 < report.seconds < 10 for report in reports)


@needs_native
def test_results_share_no_memory(whole):
    z, blocks = stack(2)
    first, *others = (block.x for block in stack_inverse(z, blocks))
    assert len(whole) == 1
    assert first.untyped_storage().nbytes() == 4 * first.numel()
    factor = torch.ones((), requires_grad=True)
    product = first * factor
    others[0].zero_()
    product.sum().backward()
    assert torch.equal(factor.grad, first.sum())


@needs_native
def test_long_sequences_run_block_by_block():
    """Attention, of which the weights tell nothing, takes most of their time."""
    spec = BlockSpec(token_dim=2, channels=8, heads=1, head_dim=8, kv_heads=1, mlp_dim=8, layers=1)
    sizes = tuple(native_stack.BlockSize(tuple(spec_fields(spec, torch.float32)), 400, 1, 0) for _ in range(4))
    assert native_stack.plan_stack(sizes, 8, 100, 1, 2**40)
    assert native_stack.plan_stack(sizes, 8, 10_000, 1, 2**40) is None


def test_a_missing_library_is_named(monkeypatch):
    z, blocks = stack(1)
    missing = lambda: "no native kernels: no compiler"  # noqa: E731
    monkeypatch.setattr(loading, "native_unavailable", missing)
    kernels = dispatch._kernels["block_inverse"]
    monkeypatch.setitem(kernels, "native", kernels["native"]._replace(unavailable=missing))
    with pytest.raises(ValueError, match="no native kernels: no compiler"):
        stack_inverse(z, blocks, backend="native")


SINGLE = {
    "jacobi": {"solver": Solver("jacobi")},
    "order": {"order": torch.arange(TOKENS)},
    "lengths": {"lengths": torch.tensor([4, 9])},
    "known": {"known": torch.tensor([2, 1]), "data": torch.ones(2, TOKENS, 3)},
}


@pytest.mark.parametrize("options", SINGLE.values(), ids=SINGLE.keys())
def test_other_options_run_block_by_block(options, whole):
    z, blocks = stack(2)
    blocks[0] = (*blocks[0][:2], {**blocks[0][2], **options})
    found = stack_inverse(z, blocks)
    assert not whole
    assert_same(found, one_by_one(z, blocks))


def test_another_dtype_runs_block_by_block(whole):
    z, blocks = stack(2)
    assert_same(stack_inverse(z.double(), blocks), one_by_one(z.double(), blocks))
    assert not whole


def test_another_backend_runs_block_by_block(whole):
    z, blocks = stack(2)
    assert_same(stack_inverse(z, blocks, backend="reference"), one_by_one(z, blocks, backend="reference"))
    assert not whole


def test_no_samples_give_no_samples():
    z, blocks = stack(0)
    assert_same(stack_inverse(z, blocks), one_by_one(z, blocks))


@needs_native
def test_a_call_that_would_not_end_soon_runs_block_by_block(whole, monkeypatch):
    z, blocks = stack(2)
    monkeypatch.setattr(native_stack, "CALL_SECONDS", 1e-6)
    native_stack.plan_stack.cache_clear()
    found = stack_inverse(z, blocks)
    native_stack.plan_stack.cache_clear()
    assert not whole
    assert_same(found, one_by_one(z, blocks))


def test_progress_of_a_block_is_reported(whole):
    z, blocks, seen = *stack(2), []
    blocks[1] = (*blocks[1][:2], {**blocks[1][2], "progress": lambda done, total: seen.append((done, total))})
    stack_inverse(z, blocks)
    assert not whole
    assert seen[-1] == (2 * TOKENS, 2 * TOKENS)


def test_gradients_flow_through_all_blocks(whole):
    z, blocks = stack(2)
    weight = blocks[2][0]["proj_out.weight"].requires_grad_()
    grads = []
    for run in (stack_inverse, one_by_one):
        noise = z.clone().requires_grad_()
        found = run(noise, blocks)
        grads.append(torch.autograd.grad(found[0].x.square().sum() + found[1].logdet.sum(), (noise, weight)))
    assert not whole
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*grads))
    assert grads[0][0].abs().min() > 0


@needs_native
def test_a_changed_weight_changes_the_result():
    z, blocks = stack(2)
    stack_inverse(z, blocks)
    blocks[1][0]["layers.0.up.bias"].data.add_(0.5)
    assert_same(stack_inverse(z, blocks), one_by_one(z, blocks, backend="native"))


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_it_is_one_graph(dynamic):
    z, blocks = stack(2)

    def run(z):
        return [found.x for found in stack_inverse(z, blocks)]

    for ours, theirs in zip(compiled(run, dynamic=dynamic)(z), run(z)):
        torch.testing.assert_close(ours, theirs)


@needs_native
def test_an_input_that_is_not_finite_is_named():
    z, blocks = stack(2)
    with pytest.raises(ValueError, match=r"^z: 1 of 54 values are not finite"):
        stack_inverse(z.index_put((torch.tensor(0), torch.tensor(0), torch.tensor(0)), torch.tensor(torch.nan)), blocks)
    blocks[0][2]["cond"][1, 2] = torch.inf
    with pytest.raises(ValueError, match=r"^cond: 1 of 48 values are not finite"):
        stack_inverse(z, blocks)


@needs_native
def test_a_result_that_is_not_finite_is_an_input_of_the_next_block():
    z, blocks = stack(2)
    blocks[1][0]["proj_out.bias"][0] = 1e5
    with pytest.raises(ValueError, match=r"^z: \d+ of 54 values are not finite"):
        stack_inverse(z, blocks)


def test_blocks_of_other_kinds_are_refused():
    z, blocks = stack(1)
    weights, spec, options = blocks[0]
    wrong_options = [[(weights, spec, None)], [(weights, spec, {**options, "backend": "reference"})]]
    for wrong in ([], blocks[0], [blocks[0][:2]], None, iter(blocks), *wrong_options):
        with pytest.raises(TypeError, match=r"^blocks: expected"):
            stack_inverse(z, wrong)


def test_an_error_of_a_block_is_that_of_its_single_call():
    z, blocks = stack(1)
    blocks[1] = (blocks[1][0], dataclasses.replace(SPECS[1], mlp_dim=41), blocks[1][2])
    with pytest.raises(ValueError, match=r"^weights\['layers.0.up.weight'\]: expected shape \(41, 24\)"):
        stack_inverse(z, blocks)
