"""solve_inverse: the inverse of any causal conditioner."""

from __future__ import annotations

import math

import pytest
import torch
from support.affine import every_spec
from support.arranged import B, drawn_call, of_first_branch
from support.blocks import T
from support.contract import strided
from support.naive import naive_affine, naive_raw

from starflow_kernels import AffineSpec, Solver, SolveReport, affine_flow, block_inverse, block_params, solve_inverse

F64 = torch.float64
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
every_order = pytest.mark.parametrize("order", ["ascending", "descending", "random"])


def permutation(order: str, T: int) -> torch.Tensor | None:
    return {"ascending": None, "descending": torch.arange(T).flip(0), "random": torch.randperm(T)}[order]


class Conditioner:
    """Two masked layers, as in MADE: the parameters of a token depend on the tokens before it in the order."""

    def __init__(self, T, D, P, order=None, hidden=6, dtype=F64):
        rank = torch.arange(T) if order is None else order.argsort()
        self.earlier = (rank[:, None] > rank[None, :]).to(dtype)
        self.same_or_earlier = (rank[:, None] >= rank[None, :]).to(dtype)
        self.mix = [torch.randn(T, T, dtype=F64).to(dtype) * 0.5 for _ in range(2)]
        self.heads = [(torch.randn(s, dtype=F64) * 0.5).to(dtype) for s in ((D, hidden), (hidden, P))]
        self.bias = (torch.randn(T, P, dtype=F64) * 0.5).to(dtype)
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        h = torch.einsum("ts,bsd,dh->bth", self.mix[0] * self.earlier, x, self.heads[0]).tanh()
        return torch.einsum("ts,bsh,hp->btp", self.mix[1] * self.same_or_earlier, h, self.heads[1]) + self.bias


@every_spec
@every_order
@pytest.mark.parametrize("T, D", [(6, 3), (9, 1)], ids=["tokens", "scalars"])
def test_density_of_the_result_is_the_noise(spec, order, T, D):
    order = permutation(order, T)
    conditioner = Conditioner(T, D, spec.params_dim(D), order)
    z = torch.randn(4, T, D, dtype=F64)
    found = solve_inverse(conditioner, z, spec, order=order)
    x, report = found.x, found.report
    torch.testing.assert_close(naive_affine(x, conditioner(x), spec)[0], z, rtol=0, atol=1e-9)
    assert (report.method, report.passes, report.tokens) == ("sequential", T, 4 * T * T)
    assert torch.equal(report.sweeps, torch.ones(4, T, dtype=torch.int32))
    assert report.certificate is None and report.seconds > 0 and report.residual == report.fallbacks == 0


@every_spec
def test_matches_a_loop_over_single_tokens(spec):
    """The loop samples row by row and token by token, from the tokens generated so far."""
    order = permutation("random", 6)
    conditioner, z = Conditioner(6, 3, spec.params_dim(3), order), torch.randn(2, 6, 3, dtype=F64)
    expected = torch.full_like(z, 1e6)
    for i in range(2):
        for t in order.tolist():
            mu, sigma = naive_raw(conditioner(expected[i : i + 1])[0, t], spec)
            expected[i, t] = mu + sigma * z[i, t]
    x = solve_inverse(conditioner, z, spec, order=order).x
    torch.testing.assert_close(x, expected, rtol=1e-11, atol=1e-11)


@every_order
def test_round_trip(order):
    spec, order = AffineSpec("softplus", 4.0), permutation(order, 6)
    conditioner, x = Conditioner(6, 3, 6, order), torch.randn(2, 6, 3, dtype=F64)
    z, _ = affine_flow(x, conditioner(x), spec)
    torch.testing.assert_close(solve_inverse(conditioner, z, spec, order=order).x, x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("T", [1, 2, 63, 111])
def test_sizes(T):
    spec = AffineSpec("softplus", 4.0)
    conditioner, z = Conditioner(T, 2, 4), torch.randn(2, T, 2, dtype=F64)
    conditioner.mix = [mix / T**0.5 for mix in conditioner.mix]
    found = solve_inverse(conditioner, z, spec, certify=True)
    x, report = found.x, found.report
    assert report.passes == T and conditioner.calls == T + 1
    torch.testing.assert_close(naive_affine(x, conditioner(x), spec)[0], z, rtol=0, atol=1e-9)


@every_dtype
def test_certificate_is_the_residual(dtype):
    conditioner, z = Conditioner(6, 3, 6, dtype=dtype), torch.randn(2, 6, 3, dtype=dtype)
    found = solve_inverse(conditioner, z, certify=True)
    x, report = found.x, found.report
    residual = (naive_affine(x, conditioner(x), AffineSpec())[0] - z).abs().max().item()
    eps = torch.finfo(dtype).eps
    assert report.certificate == pytest.approx(residual, abs=64 * eps)
    assert 0 <= report.certificate < 1e4 * eps


def test_certificate_exposes_a_conditioner_that_is_not_causal():
    order = torch.arange(6)
    conditioner, z = Conditioner(6, 3, 6, order), torch.randn(2, 6, 3, dtype=F64)
    report = solve_inverse(conditioner, z, order=order.flip(0), certify=True).report
    assert report.certificate > 1e-3


class Shifted(torch.nn.Module):
    """Token t - 1 in the place of token t."""

    def forward(self, x):
        return torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]


def test_a_conditioner_that_changes_its_input_is_refused():
    def conditioner(x):
        params = torch.zeros(len(x), 4, 4)
        x.mul_(2)
        return params

    with pytest.raises(ValueError, match="conditioner: it modified its input in place"):
        solve_inverse(conditioner, torch.randn(2, 4, 2))


def test_module_with_gradients_and_inputs_are_left_alone():
    conditioner = torch.nn.Sequential(Shifted(), torch.nn.Linear(3, 6, dtype=F64))
    z = strided(torch.randn(2, 4, 3, dtype=F64)).requires_grad_()
    before = z.detach().clone()
    found = solve_inverse(conditioner, z, certify=True)
    x, report = found.x, found.report
    assert x.requires_grad and torch.equal(z, before)
    assert report.certificate < 1e-12 and isinstance(report, SolveReport)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"z": 0.0}, TypeError, "z: expected a tensor"),
        ({"z": torch.zeros(4, 2)}, ValueError, r"z: expected shape \(B, T, D\)"),
        ({"z": torch.full((1, 4, 2), math.nan)}, ValueError, "z: 8 of 8 values are not finite"),
        ({"z": torch.tensor([[[0.0, math.inf]]])}, ValueError, "z: 1 of 2 values are not finite"),
        ({"solver": "jacobi"}, TypeError, "solver: expected a Solver, got str"),
        ({"solver": Solver("jacobi", window=2)}, ValueError, "solver: window=2, expected 0"),
        (
            {"guess": torch.zeros(1, 4, 2), "solver": Solver()},
            ValueError,
            "guess: given, but the sequential solver takes none",
        ),
        ({"guess": "noise", "solver": Solver("jacobi")}, TypeError, "guess: expected a tensor"),
        ({"guess": torch.zeros(1, 3, 2), "solver": Solver("jacobi")}, ValueError, "guess: expected shape"),
        (
            {"guess": torch.full((1, 4, 2), math.nan), "solver": Solver("jacobi")},
            ValueError,
            "guess: 8 of 8 values are not finite",
        ),
        ({"context": torch.zeros(1)}, TypeError, "context: expected a tuple of tensors, got Tensor"),
        ({"context": (None,)}, TypeError, r"context\[0\]: expected a tensor, got NoneType"),
        ({"context": (torch.zeros(1), torch.zeros(()))}, ValueError, r"context\[1\]: shape \(\), expected 1 rows"),
        ({"context": (torch.zeros(2),)}, ValueError, r"context\[0\]: shape \(2,\), expected 1 rows"),
        ({"order": [0, 1, 2, 3]}, TypeError, "order: expected an integer tensor, got list"),
        ({"order": torch.arange(4.0)}, TypeError, "order: expected an integer tensor, got torch.float32"),
        (
            {"order": torch.tensor([0, 1, 1, 3])},
            ValueError,
            r"order: expected a permutation of 0 .. 3, got \[0, 1, 1, 3\]",
        ),
        ({"order": torch.arange(1, 5)}, ValueError, "order: expected a permutation"),
        ({"order": torch.arange(3)}, ValueError, r"order: expected shape \(4,\) or \(1, 4\), got \(3,\)"),
        ({"conditioner": lambda x: x}, ValueError, r"output of the conditioner: expected shape \(1, 4, 4\)"),
        ({"conditioner": lambda x: None}, TypeError, "output of the conditioner: expected a tensor"),
        ({"spec": AffineSpec("unit")}, ValueError, r"output of the conditioner: expected shape \(1, 4, 2\)"),
        ({"conditioner": lambda x: x.repeat(1, 1, 2) + 1e3}, ValueError, "not finite at token 0 of sample 0"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {"conditioner": lambda x: torch.zeros(1, 4, 4), "z": torch.ones(1, 4, 2)}
    with pytest.raises(error, match=message):
        solve_inverse(**{**arguments, **change})


def row_by_row(conditioner):
    """Return the same function applied row by row, so that its bits do not depend on the batch."""
    return lambda x, *context: torch.cat(
        [conditioner(x[i : i + 1], *(c[i : i + 1] for c in context)) for i in range(len(x))]
    )


def sheared(maps, offsets=(1,), order=None):
    """Return a conditioner linear in its neighbours: mu_t = sum_k M_k x_{t-k}, log sigma = 0.3."""

    def conditioner(x):
        places = torch.arange(x.shape[1]) if order is None else order
        ordered, mu = x[:, places], torch.zeros_like(x)
        for t in range(len(places)):
            for offset, by in zip(offsets, maps):
                if offset <= t:
                    mu[:, places[t]] += ordered[:, t - offset] @ by.T
        return torch.cat([torch.full_like(mu, 0.3), mu], -1)

    return conditioner


def random_maps(count, D, dtype=F64):
    """Return one matrix per neighbour; their norms sum to 0.9."""
    return (0.9 / count * torch.linalg.qr(torch.randn(count, D, D, dtype=F64)).Q).to(dtype)


solvers = pytest.mark.parametrize("offsets", [(), (1, 4), (2, 30)], ids=["jacobi", "newton", "newton-far"])


@every_order
@every_dtype
@solvers
@pytest.mark.parametrize("T, D", [(1, 3), (2, 1), (17, 1), (17, 3)])
@pytest.mark.parametrize("guess", ["noise", "zero", "tensor"])
def test_the_fixed_point_has_the_bits_of_sequential(order, dtype, offsets, T, D, guess):
    """Neighbours that do not fit the conditioner change the sweeps, not the result."""
    spec, order = AffineSpec("softplus", 4.0), permutation(order, T)
    conditioner = row_by_row(Conditioner(T, D, 2 * D, order, dtype=dtype))
    z = strided(torch.randn(5, T, D, dtype=dtype))
    solver = Solver("jacobi", guess="zero" if guess == "zero" else "noise", tol=0, neighbours=offsets)
    first = torch.randn(5, T, D, dtype=dtype) if guess == "tensor" else None
    found = solve_inverse(conditioner, z, spec, order=order, solver=solver, guess=first)
    x, report = found.x, found.report
    assert torch.equal(x, solve_inverse(conditioner, z, spec, order=order).x)
    assert report.method == "jacobi" and report.residual == report.fallbacks == 0
    assert report.sweeps.shape == (5, T) and report.sweeps.dtype == torch.int32
    assert report.passes == report.sweeps.max() <= T and report.tokens == report.sweeps.sum()
    assert (report.sweeps == report.sweeps[:, :1]).all()


@pytest.mark.parametrize("tol", [1e-2, 1e-6])
@solvers
def test_a_sweep_changed_no_value_of_the_result_by_more_than_the_tolerance(tol, offsets):
    """The residual is the last change; it is not zero before the fixed point."""
    conditioner, z = Conditioner(32, 3, 6), torch.randn(6, 32, 3, dtype=F64)
    conditioner.mix = [mix / 3 for mix in conditioner.mix]
    spec = AffineSpec("softplus", 4.0)
    found = solve_inverse(conditioner, z, spec, solver=Solver("jacobi", tol=tol, neighbours=offsets))
    x, report = found.x, found.report
    assert 0 < report.residual <= tol and report.passes < 32
    mu, sigma = naive_raw(conditioner(x), spec)
    assert (mu + sigma * z - x).abs().max() < 4 * tol


def test_no_residual_after_as_many_sweeps_as_tokens():
    """The changes of this chain stay large until every token is computed from exact ones."""
    chain, z = sheared(torch.full((1, 1, 1), -1.0, dtype=F64)), torch.randn(2, 9, 1, dtype=F64)
    found = solve_inverse(chain, z, solver=Solver("jacobi", tol=1e-9))
    x, report = found.x, found.report
    assert report.passes == 9 and report.residual == 0
    torch.testing.assert_close(x, solve_inverse(chain, z).x, rtol=0, atol=1e-12)


def test_context_leaves_the_batch_with_its_samples():
    scale, conditioner, z = torch.logspace(-3, 0, 4, dtype=F64), Conditioner(17, 3, 6), torch.randn(4, 17, 3, dtype=F64)
    arguments = {"spec": AffineSpec("softplus", 4.0), "solver": Solver("jacobi")}

    def scaled(x, c):
        return conditioner(x) * c[:, None, None]

    found = solve_inverse(scaled, z, context=(scale,), **arguments)
    x, report = found.x, found.report
    assert report.sweeps[0, 0] < report.sweeps[3, 0]
    for i in range(4):
        found = solve_inverse(scaled, z[i : i + 1], context=(scale[i : i + 1],), **arguments)
        one, alone = found.x, found.report
        assert torch.equal(alone.sweeps, report.sweeps[i : i + 1])
        torch.testing.assert_close(one[0], x[i], rtol=0, atol=1e-12)


def squares(order, most=math.inf):
    """Return log sigma_t = x_{t-1}^2, and -10 at the first token: noise may overflow though the solution is small."""

    def conditioner(x):
        before = x[:, order].square().clamp(max=most)[:, :-1]
        log_sigma = torch.nn.functional.pad(before, (0, 0, 1, 0)) - 10 * (torch.arange(x.shape[1]) == 0)[:, None].to(x)
        return torch.cat([log_sigma, 0 * x], -1)[:, order.argsort()]

    return row_by_row(conditioner)


@every_order
@every_dtype
@pytest.mark.parametrize(
    "start, most", [(50.0, math.inf), (2.5, math.inf), (50.0, 30.0)], ids=["infinite", "infinite-later", "finite"]
)
@pytest.mark.parametrize("neighbours", [False, True])
def test_samples_that_diverge_fall_back_alone(order, dtype, start, most, neighbours):
    """One of three samples leaves the finite numbers, or the reasonable ones, from its own noise: the others keep the
    bits and sweeps that they have without it."""
    order = permutation(order, 6)
    order = torch.arange(6) if order is None else order
    z = torch.randn(3, 6, 1, dtype=dtype) * 0.1
    z[1] = 0.1
    z[1, order[0]] = start
    conditioner, arguments = squares(order, most), {"order": order, "solver": Solver("jacobi", tol=0)}
    if neighbours:
        arguments["solver"] = Solver("jacobi", tol=0, neighbours=(1,))
    found = solve_inverse(conditioner, z, **arguments)
    x, report = found.x, found.report
    assert torch.equal(x, solve_inverse(conditioner, z, order=order).x) and x.abs().max() < 1
    assert report.fallbacks == 1 and report.residual == 0 and report.passes == report.sweeps[1, 0] == 7
    found = solve_inverse(conditioner, z[::2], **arguments)
    others, calm = found.x, found.report
    assert torch.equal(others, x[::2]) and torch.equal(calm.sweeps, report.sweeps[::2]) and calm.fallbacks == 0


def test_a_guess_that_overflows_falls_back():
    z, guess = torch.full((2, 4, 1), 0.1, dtype=F64), torch.tensor([300.0, 1.0], dtype=F64)[:, None, None]
    found = solve_inverse(squares(torch.arange(4)), z, guess=guess.expand(2, 4, 1), solver=Solver("jacobi", tol=0))
    x, report = found.x, found.report
    assert torch.equal(x, solve_inverse(squares(torch.arange(4)), z).x) and report.fallbacks == 1


@pytest.mark.parametrize("solver", [Solver(), Solver("jacobi"), Solver("jacobi", tol=0)], ids=str)
@every_order
def test_error_names_token_and_sample(order, solver):
    order = permutation(order, 6)
    order = torch.arange(6) if order is None else order
    z = torch.randn(3, 6, 1) * 0.1
    z[1, order[2]] = 40.0
    with pytest.raises(ValueError, match=f"not finite at token {order[3]} of sample 1"):
        solve_inverse(squares(order), z, order=order, solver=solver)


@every_dtype
def test_an_empty_batch(dtype):
    conditioner = Conditioner(4, 2, 4, dtype=dtype)
    for solver in (Solver(), Solver("jacobi", neighbours=(1,))):
        found = solve_inverse(conditioner, torch.zeros(0, 4, 2, dtype=dtype), solver=solver, certify=True)
        x, report = found.x, found.report
        assert x.shape == (0, 4, 2) and report.tokens == 0 and report.sweeps.shape == (0, 4)


@every_order
@every_dtype
@pytest.mark.parametrize("D", [1, 3])
def test_the_model_of_a_linear_conditioner_is_found(order, dtype, D):
    """Two sweeps determine the model, but for its ridge."""
    order, z = permutation(order, 48), torch.randn(4, 48, D, dtype=dtype)
    conditioner = sheared(random_maps(2, D, dtype), (1, 5), order)
    expected = solve_inverse(conditioner, z, order=order).x
    tol = 2e-5 if dtype == torch.float32 else 1e-9
    found = solve_inverse(conditioner, z, order=order, solver=Solver("jacobi", tol=tol, neighbours=(1, 5)))
    x, report = found.x, found.report
    assert (x - expected).abs().max() < 5 * tol * max(1, expected.abs().max())
    plain = solve_inverse(conditioner, z, order=order, solver=Solver("jacobi", tol=tol)).report
    assert report.passes <= plain.passes / 2


def test_the_model_lowers_the_passes_of_a_nonlinear_chain():
    """The derivatives of mu and log sigma differ from token to token; their common part lowers the passes."""
    by_mu, by_log_sigma = random_maps(2, 2) * 1.6

    def conditioner(x):
        before = torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
        return torch.cat([0.2 * (before @ by_log_sigma.T).tanh(), before @ by_mu.T + 0.2 * before.sin()], -1)

    z = torch.randn(8, 80, 2, dtype=F64)
    exact = solve_inverse(conditioner, z).x
    plain, newton = (solve_inverse(conditioner, z, solver=Solver("jacobi", tol=1e-8, neighbours=k)) for k in ((), (1,)))
    assert newton.report.passes <= 0.6 * plain.report.passes
    for found in (plain, newton):
        torch.testing.assert_close(found.x, exact, rtol=0, atol=1e-6)


def test_an_unstable_model_does_not_lead_away():
    """The largest change bounds the correction of the model, so that values cannot grow from token to token."""
    z = torch.randn(3, 200, 1, dtype=F64)
    chain = sheared(torch.full((1, 1, 1), 1.5, dtype=F64))

    def conditioner(x):
        return chain(x.tanh())

    solver = Solver("jacobi", tol=1e-9, neighbours=(1,))
    found = solve_inverse(conditioner, z, solver=solver)
    x, report = found.x, found.report
    assert report.fallbacks == 0 and report.passes < 200
    torch.testing.assert_close(x, solve_inverse(conditioner, z).x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("neighbours", [None, (), (1,)])
@pytest.mark.parametrize("part", range(10))
def test_orders_lengths_and_given_tokens_are_those_of_a_block(part, neighbours):
    solver = Solver() if neighbours is None else Solver("jacobi", tol=1e-12, neighbours=neighbours)
    for seed in range(part, 100, 10):
        z, w, spec, context, layout, inverse = drawn_call(seed)
        given = {name: inverse[name] for name in ("data", "known")}
        whole = {**of_first_branch(context), **layout}

        def conditioner(x, rows, w=w, spec=spec, whole=whole):
            per_sample = {n: v for n, v in whole.items() if v is not None and v.shape[:1] == (B,)}
            return block_params(x, w, spec, **{**whole, **{n: v[rows] for n, v in per_sample.items()}})

        order = torch.arange(T - 1, -1, -1) if spec.flip else layout["order"]
        options = {"order": order, "lengths": layout["lengths"], "context": (torch.arange(B),), "solver": solver}
        x = solve_inverse(conditioner, z, spec.affine, **given, **options).x
        torch.testing.assert_close(x, block_inverse(z, w, spec, **whole, **given).x, rtol=1e-8, atol=1e-8)


def test_only_tokens_that_are_not_given_are_solved():
    conditioner, z = Conditioner(6, 3, 6), torch.randn(3, 6, 3, dtype=F64)
    given = {"data": torch.randn(3, 6, 3, dtype=F64), "known": torch.tensor([4, 5, 6])}
    found = solve_inverse(conditioner, z, **given, lengths=torch.tensor([6, 5, 6]), certify=True)
    x, report = found.x, found.report
    assert report.passes == 2 and report.certificate < 1e-12
    assert torch.equal(x[2], given["data"][2]) and torch.equal(x[1, 5], z[1, 5])
