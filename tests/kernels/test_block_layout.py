"""Orders, lengths and conditions per token of the block functions."""

from __future__ import annotations

import dataclasses
import functools
import math
import pickle
import weakref

import pytest
import torch
from support.arranged import B, drawn_call, expected_forward, expected_inverse, of_first_branch
from support.backends import cpu_backends, needs_native
from support.blocks import BLOCKS, F64, SIZES, T, block, tame_block
from support.contract import compiled, strided
from support.naive import reduced

from starflow_kernels import AffineSpec, BlockSpec, Solver, block_forward, block_inverse, block_params

CALLS = 500
PARTS = 25
parts = pytest.mark.parametrize("part", range(PARTS))
ORDER, LENGTHS = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([4, 0, 5])
JACOBI = Solver("jacobi", window=3, tol=0)


def calls(part, dtype=F64):
    """Return some of the drawn calls."""
    return [drawn_call(seed, dtype) for seed in range(part, CALLS, PARTS)]


@parts
@pytest.mark.parametrize("backend", cpu_backends("block_forward", lambda name: name != "native"))
def test_forward_of_drawn_calls(part, backend):
    for x, w, spec, context, layout, _ in calls(part):
        context = of_first_branch(context)
        z, minus_log_sigma = expected_forward(x, w, spec, context, **layout)
        given = {**context, **layout, "backend": backend}
        actual, values = block_forward(x, w, spec, **given, logdet="none")
        torch.testing.assert_close([actual, values], [z, minus_log_sigma], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(block_forward(x, w, spec, **given)[1], minus_log_sigma.sum((1, 2)))


@parts
@pytest.mark.parametrize("backend", cpu_backends("block_inverse", lambda name: name != "native"))
def test_inverse_of_drawn_calls(part, backend):
    for z, w, spec, context, layout, inverse in calls(part):
        expected = expected_inverse(z, w, spec, context, **layout, **inverse)
        for solver in (Solver(), Solver("jacobi", window=3, tol=1e-12)):
            found = block_inverse(z, w, spec, **context, **layout, **inverse, solver=solver, backend=backend)
            torch.testing.assert_close(found.x, expected, rtol=1e-8, atol=1e-8)
            if inverse["guidance"] is None and inverse["known"] is None:
                _, logdet = block_forward(found.x, w, spec, **context, **layout)
                torch.testing.assert_close(found.logdet, -logdet, rtol=1e-8, atol=1e-8)


@needs_native
@parts
def test_native_kernels_of_drawn_calls(part):
    for x, w, spec, context, layout, inverse in calls(part, torch.float32):
        exact = [{name: value.double() for name, value in values.items()} for values in (w, context)]
        z, minus_log_sigma = expected_forward(x.double(), exact[0], spec, of_first_branch(exact[1]), **layout)
        actual = block_forward(x, w, spec, **of_first_branch(context), **layout, logdet="none", backend="native")
        torch.testing.assert_close(actual, (z.float(), minus_log_sigma.float()), rtol=1e-4, atol=1e-4)
        data = None if inverse["data"] is None else inverse["data"].double()
        expected = expected_inverse(x.double(), exact[0], spec, exact[1], **layout, **{**inverse, "data": data})
        options = {**context, **layout, **inverse, "backend": "native"}
        back = block_inverse(x, w, spec, **options)
        torch.testing.assert_close(back.x, expected.float(), rtol=1e-3, atol=1e-3)
        assert torch.equal(block_inverse(x, w, spec, **options, solver=JACOBI).x, back.x)
        exact = block_inverse(x, w, spec, **{**options, "backend": "reference"})
        torch.testing.assert_close(back.logdet, exact.logdet, rtol=1e-3, atol=1e-2)


def test_a_result_moves_like_a_tensor():
    z, w, spec, context = block(BLOCKS["starflow"])
    found = block_inverse(z, w, spec, **context)
    moved = found.to(torch.float32)
    assert torch.equal(moved.x, found.x.float()) and moved.logdet.dtype == torch.float32
    torch.testing.assert_close(moved.logdet, found.logdet.float())
    assert moved.report.passes == found.report.passes


def test_a_result_is_pickled_with_what_it_has_not_computed():
    z, w, spec, context = block(BLOCKS["starflow"])
    found = block_inverse(z, w, spec, **context)
    read = pickle.loads(pickle.dumps(found))
    assert torch.equal(read.x, found.x) and torch.equal(read.logdet, found.logdet)
    assert torch.equal(read.report.sweeps, found.report.sweeps)


@pytest.mark.parametrize("part", range(5))
def test_the_logdet_of_the_inverse_is_that_of_its_jacobian(part):
    """Also under guidance and behind given tokens; differences are central."""
    for seed in range(part, 40, 5):
        z, w, spec, context, layout, inverse = drawn_call(seed)

        run = functools.partial(block_inverse, weights=w, spec=spec, **context, **layout, **inverse)
        steps = 1e-5 * torch.eye(z[0].numel(), dtype=F64).view(-1, *z.shape[1:])
        columns = [(run(z + step).x - run(z - step).x).flatten(1) / 2e-5 for step in steps]
        jacobian = torch.stack(columns, 2)
        # A given token does not depend on its noise.
        jacobian += torch.diag_embed((jacobian.abs().sum(1) == 0).to(F64))
        torch.testing.assert_close(run(z).logdet, torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("solver", [Solver(), JACOBI])
@pytest.mark.parametrize("scale", ["exp", "softplus"])
@pytest.mark.parametrize("backend", cpu_backends("block_inverse"))
def test_the_logdet_of_scales_that_underflow(backend, scale, solver):
    z, w, spec, context = block(BLOCKS["starflow"], dtype=torch.float32, affine=AffineSpec(scale), start=True)
    w["proj_out.weight"], w["proj_out.bias"] = w["proj_out.weight"] * 0, torch.full((2 * spec.token_dim,), -120.0)
    found = block_inverse(z, w, spec, **context, solver=solver, backend=backend)
    log_sigma = -120.0 if scale == "exp" else -120.0 + math.log(math.e - 1)
    torch.testing.assert_close(found.logdet, torch.full((len(z),), T * spec.token_dim * log_sigma))


@pytest.mark.parametrize("name", ["tarflow-flip", "starflow-identity-first", "starflow-text"])
@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_params_are_those_of_forward(name, lengths):
    x, w, spec, context = block(BLOCKS[name], B=3, flip=False)
    params = block_params(x, w, spec, **context, order=ORDER, lengths=lengths)
    z, values = block_forward(x, w, spec, **context, order=ORDER, lengths=lengths, logdet="none")
    a, mu = params.chunk(2, -1)
    if spec.affine.soft_clip:
        a, mu = (spec.affine.soft_clip * torch.tanh(raw / spec.affine.soft_clip) for raw in (a, mu))
    sigma = a.exp() if spec.affine.scale == "exp" else torch.nn.functional.softplus(a + math.log(math.e - 1))
    torch.testing.assert_close([z, values], [(x - mu) / sigma, -sigma.log()], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("logdet", ["sum", "mean", "none"])
@pytest.mark.parametrize("name", ["tarflow-flip", "starflow-text-flip-cond"])
def test_gradients_reach_every_tensor(name, logdet):
    x, w, spec, context = block(BLOCKS[name], B=3, flip=False, layers=1)
    context["cond"] = torch.randn(3, T, spec.channels, dtype=F64)
    names, tensors = list(context), [x, *context.values(), *w.values()]

    def function(x, *values):
        given = dict(zip(names, values))
        weights = dict(zip(w, values[len(names) :]))
        return block_forward(x, weights, spec, **given, order=ORDER, lengths=LENGTHS, logdet=logdet)

    tensors = [t if n in ("cos", "sin") else t.requires_grad_() for n, t in zip(["x", *names, *w], tensors)]
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("logdet", ["sum", "mean"])
def test_the_logdet_is_that_of_the_tokens_of_a_sample(logdet):
    x, w, spec, context = block(BLOCKS["starflow"], B=3)
    _, values = block_forward(x, w, spec, **context, lengths=LENGTHS, logdet="none")
    _, actual = block_forward(x, w, spec, **context, lengths=LENGTHS, logdet=logdet)
    inside = [values[b : b + 1, : max(1, n)] for b, n in enumerate(LENGTHS.tolist())]
    torch.testing.assert_close(actual, torch.cat([reduced(part, logdet) for part in inside]))
    assert actual[1] == 0


@pytest.mark.parametrize("solver", [Solver(), JACOBI])
@pytest.mark.parametrize("name", ["tarflow-flip", "starflow"])
def test_values_beyond_the_lengths_influence_nothing(name, solver):
    x, w, spec, context = block(BLOCKS[name], B=3, dtype=torch.float32)
    outside = torch.arange(T) >= LENGTHS[:, None]
    poisoned = x.masked_fill(outside[:, :, None], math.nan)
    for flow in (block_forward, lambda *a, **c: block_inverse(*a, **c, solver=solver).x):
        clean, dirty = (flow(t, w, spec, **context, lengths=LENGTHS) for t in (x, poisoned))
        clean, dirty = ((r if isinstance(r, tuple) else (r,)) for r in (clean, dirty))
        assert torch.equal(dirty[0][~outside], clean[0][~outside]) and dirty[0][outside].isnan().all()
        assert all(torch.equal(a, b) for a, b in zip(clean[1:], dirty[1:]))


@needs_native
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
def test_a_padded_batch_has_the_bits_of_its_rows(flip, per_token):
    spec, tokens = BlockSpec(**SIZES, flip=flip, start=True), 37
    x, w, context = tame_block(spec, 4, tokens)
    if per_token:
        context["cond"] = torch.randn(4, tokens, spec.channels)
    lengths = torch.tensor([37, 20, 1, 33])
    z, logdet = block_forward(x, w, spec, **context, lengths=lengths, backend="native")
    back = block_inverse(z, w, spec, **context, lengths=lengths, backend="native").x
    for b, n in enumerate(lengths.tolist()):
        cond = context["cond"][b : b + 1]
        given = {"cond": cond[:, :n] if per_token else cond, "backend": "native"}
        alone, own = block_forward(x[b : b + 1, :n], w, spec, **given)
        assert torch.equal(z[b, :n], alone[0]) and torch.equal(logdet[b], own[0])
        assert torch.equal(back[b, :n], block_inverse(alone, w, spec, **given).x[0])


@needs_native
@pytest.mark.parametrize("rows", [1, 3])
def test_a_permuted_block_has_the_bits_of_the_block_on_permuted_data(rows):
    spec, tokens = BlockSpec(**SIZES, positions=37), 37
    x, w, _ = tame_block(spec, 3, tokens)
    order = torch.stack([torch.randperm(tokens) for _ in range(rows)])
    for b in range(3):
        own = order[b % rows]
        permuted = {**w, "pos_embed": w["pos_embed"][own]}
        z, logdet = block_forward(x[b : b + 1, own], permuted, spec, backend="native")
        given = {"order": own if rows == 1 else order.expand(3, -1), "backend": "native"}
        actual, own_logdet = block_forward(x, w, spec, **given)
        assert torch.equal(actual[b, own], z[0]) and torch.equal(own_logdet[b], logdet[0])
        assert torch.equal(
            block_inverse(actual, w, spec, **given).x[b, own], block_inverse(z, permuted, spec, backend="native").x[0]
        )


@pytest.mark.parametrize("flip, order, lengths", [(True, None, None), (False, ORDER, None), (False, ORDER, LENGTHS)])
@pytest.mark.parametrize("name", ["starflow-grouped", "adaptive"])
def test_a_condition_in_the_own_order_has_the_bits_of_one_in_that_of_the_data(name, flip, order, lengths):
    x, w, spec, context = block(BLOCKS[name], B=3, flip=flip)
    context["cond"] = torch.randn(3, T, spec.cond_dim, dtype=F64)
    given = {**context, "order": order, "lengths": lengths}
    tokens = torch.arange(T - 1, -1, -1) if order is None else order
    if lengths is not None:
        inside = tokens < lengths[:, None]
        tokens = tokens.expand(3, T).gather(1, (~inside).long().argsort(dim=1, stable=True))
    rows = torch.arange(3)[:, None]
    moved = {**given, "cond": context["cond"][rows, tokens], "cond_in_order": True}
    assert all(map(torch.equal, block_forward(x, w, spec, **given), block_forward(x, w, spec, **moved)))
    assert torch.equal(block_params(x, w, spec, **given), block_params(x, w, spec, **moved))
    for solver in (Solver(), JACOBI):
        found = block_inverse(x, w, spec, **given, solver=solver)
        assert torch.equal(found.x, block_inverse(x, w, spec, **moved, solver=solver).x)


def test_a_condition_in_the_own_order_has_its_gradient_in_it():
    x, w, spec, context = block(BLOCKS["adaptive"], B=3, flip=False)
    cond = torch.randn(3, T, spec.cond_dim, dtype=F64, requires_grad=True)
    gradients = []
    for given in ({"cond": cond[:, ORDER], "cond_in_order": True}, {"cond": cond}):
        found = block_inverse(x, w, spec, **{**context, **given}, order=ORDER)
        gradients.append(torch.autograd.grad(found.x.square().sum() + found.logdet.sum(), cond)[0])
    torch.testing.assert_close(*gradients)


def test_a_result_does_not_keep_its_condition():
    x, w, spec, context = block(BLOCKS["adaptive"], B=3)
    context["cond"] = torch.randn(3, T, spec.cond_dim, dtype=F64)
    kept = weakref.ref(context["cond"])
    found = block_inverse(x, w, spec, **context)
    del context
    assert kept() is None and found.report.method == "sequential"


def test_the_reverse_order_is_flip():
    x, w, spec, context = block(BLOCKS["starflow"], B=3)
    flipped = dataclasses.replace(spec, flip=True)
    order = torch.arange(T - 1, -1, -1)
    expected = block_forward(x, w, flipped, **context)
    torch.testing.assert_close(block_forward(x, w, spec, **context, order=order), expected)


@pytest.mark.parametrize("solver", [Solver(), Solver("jacobi", tol=0)])
def test_no_steps_beyond_the_longest_sample(solver):
    x, w, spec, context = block(BLOCKS["starflow"], B=3)
    lengths = torch.tensor([2, 0, 3])
    report = block_inverse(x, w, spec, **context, lengths=lengths, solver=solver).report
    assert report.passes <= 3 and report.sweeps.shape == (3, T) and not report.sweeps[:, 3:].any()


@needs_native
@pytest.mark.parametrize("solver", [Solver(), JACOBI])
def test_sampling_after_given_tokens_has_the_bits_of_a_sample_that_has_them(solver):
    spec, tokens = BlockSpec(**SIZES, start=True, flip=True, positions=37), 37
    z, w, context = tame_block(spec, 4, tokens)
    x = block_inverse(z, w, spec, **context, backend="native").x
    known = torch.tensor([0, 37, 5, 20])
    given = torch.arange(tokens).flip(0) < known[:, None]
    data, noise = (t.masked_fill(mask[:, :, None], math.nan) for t, mask in ((x, ~given), (z, given)))
    options = {"data": data, "known": known, "solver": solver, "backend": "native"}
    assert torch.equal(block_inverse(noise, w, spec, **context, **options).x, x)


def test_given_tokens_need_no_passes():
    x, w, spec, context = block(BLOCKS["starflow"], B=3)
    report = block_inverse(
        x, w, spec, **context, data=x, known=torch.tensor([5, 3, 4]), solver=Solver("jacobi", window=1),
    ).report  # fmt: skip
    assert report.passes == 2 and report.sweeps.tolist() == [[0] * 5, [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]


def test_the_report_counts_the_tokens_that_are_solved():
    x, w, spec, context = block(BLOCKS["starflow"], B=3)
    report = block_inverse(
        x, w, spec, **context, data=x, known=torch.tensor([4, 1, 2]), lengths=torch.tensor([5, 3, 2])
    ).report
    assert report.sweeps.tolist() == [[0, 0, 0, 0, 1], [0, 1, 1, 0, 0], [0] * 5]
    assert (report.passes, report.tokens) == (3, 3)


@pytest.mark.parametrize("rows", [0, 2])
@pytest.mark.parametrize("lengths", [None, [1, 1]])
def test_one_token_and_no_rows(rows, lengths):
    x, w, spec, context = block(BLOCKS["tarflow-start-flip"], B=rows, tokens=1, flip=False)
    order, lengths = (
        torch.zeros(1, dtype=torch.int64),
        None if lengths is None else torch.tensor(lengths[:rows], dtype=torch.int64),
    )
    z, logdet = block_forward(x, w, spec, **context, order=order, lengths=lengths)
    back = block_inverse(z, w, spec, **context, order=order, lengths=lengths).x
    torch.testing.assert_close(back, x)
    assert logdet.shape == (rows,)


def test_strided_arguments_and_narrow_integers():
    x, w, spec, context = block(BLOCKS["starflow-grouped"], B=3)
    context["cond"] = torch.randn(3, T, spec.channels, dtype=F64)
    expected = block_forward(x, w, spec, **context, order=ORDER, lengths=LENGTHS)
    given = {**context, "cond": strided(context["cond"]), "order": ORDER.int(), "lengths": LENGTHS.to(torch.uint8)}
    assert all(map(torch.equal, block_forward(strided(x), w, spec, **given), expected))


def test_one_graph():
    x, w, spec, context = block(BLOCKS["tarflow-flip"], B=3)

    def both(x, lengths):
        z, logdet = block_forward(x, w, spec, **context, lengths=lengths)
        return z, logdet, block_inverse(z, w, spec, **context, lengths=lengths).x

    torch.testing.assert_close(compiled(both)(x, LENGTHS), both(x, LENGTHS))


def test_an_adaptive_block_needs_a_condition_of_its_width():
    x, w, spec, context = block(BLOCKS["adaptive"], B=B)
    with pytest.raises(ValueError, match="cond: an adaptive block needs a condition"):
        block_forward(x, w, spec)
    with pytest.raises(ValueError, match=r"cond: expected shape \(3, 104\), got \(3, 8\)"):
        block_forward(x, w, spec, cond=context["cond"][:, :8])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"order": [0, 1, 2, 3, 4]}, TypeError, "order: expected an integer tensor, got list"),
        ({"order": torch.arange(4)}, ValueError, r"order: expected shape \(5,\) or \(3, 5\), got \(4,\)"),
        (
            {"order": torch.tensor([0, 1, 1, 3, 4])},
            ValueError,
            r"order: expected a permutation of 0 .. 4, got \[0, 1, 1",
        ),
        (
            {"order": torch.zeros(3, T, dtype=torch.int64)},
            ValueError,
            r"order: expected a permutation of 0 .. 4, got \[0",
        ),
        ({"lengths": 4}, TypeError, "lengths: expected an integer tensor, got int"),
        ({"lengths": torch.ones(3)}, TypeError, "lengths: expected an integer tensor, got torch.float32"),
        (
            {"lengths": torch.ones(3, dtype=torch.bool)},
            TypeError,
            "lengths: expected an integer tensor, got torch.bool",
        ),
        ({"lengths": torch.ones(2, dtype=torch.int64)}, ValueError, r"lengths: expected shape \(3,\), got \(2,\)"),
        ({"lengths": torch.tensor([1, 6, 0])}, ValueError, r"lengths: expected numbers from 0 to 5, got \[1, 6, 0\]"),
        ({"lengths": torch.tensor([1, -1, 0])}, ValueError, r"lengths: expected numbers from 0 to 5, got \[1, -1, 0\]"),
        ({"cond": torch.zeros(3, T - 1, 8)}, ValueError, r"cond: expected shape \(3, 5, 8\), got \(3, 4, 8\)"),
    ],
)
@pytest.mark.parametrize("function", [block_forward, block_params, block_inverse])
def test_errors_name_the_argument(function, changes, error, message):
    x, w, spec, context = block(BLOCKS["starflow"], B=B)
    with pytest.raises(error, match=message):
        function(x, w, spec, **{**context, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data": None}, ValueError, "data, known: one is given without the other"),
        ({"known": None}, ValueError, "data, known: one is given without the other"),
        ({"known": 2}, TypeError, "known: expected an integer tensor, got int"),
        ({"known": torch.tensor([1, 2, 6])}, ValueError, r"known: expected numbers from 0 to 5, got \[1, 2, 6\]"),
        ({"known": torch.ones(2).long()}, ValueError, r"known: expected shape \(3,\), got \(2,\)"),
        ({"data": torch.zeros(3, T, 2)}, ValueError, r"data: expected shape \(3, 5, 3\), got \(3, 5, 2\)"),
        ({"data": torch.full((3, T, 3), math.nan)}, ValueError, "data: 9 of 45 values are not finite"),
    ],
)
def test_errors_of_given_tokens(changes, error, message):
    z, w, spec, context = block(BLOCKS["starflow"], B=B)
    given = {"data": torch.zeros(3, T, 3), "known": torch.tensor([1, 1, 1]), **changes}
    with pytest.raises(error, match=message):
        block_inverse(z, w, spec, **context, **given)


@pytest.mark.parametrize("function", [block_forward, block_params, block_inverse])
def test_an_order_is_in_place_of_flip(function):
    x, w, spec, context = block(BLOCKS["starflow-flip"])
    with pytest.raises(ValueError, match="order: given, but the block has an order of its own, flip=True"):
        function(x, w, spec, **context, order=torch.arange(T))
