"""block_inverse by Jacobi sweeps over windows of tokens: the sequential result in fewer passes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from support.backends import cpu_backends, needs_native
from support.blocks import WIDE_SPECS, every_wide_spec, rows, tame_block

from starflow_kernels import BlockSpec, Solver, block_forward, block_inverse

F64 = torch.float64
SOLVERS = {
    "all": Solver("jacobi"),
    "zero": Solver("jacobi", guess="zero"),
    "window": Solver("jacobi", window=7),
    "modules": Solver("jacobi", window=7, slide=False),
    "quasi-newton": Solver("jacobi", neighbours=(1, 5)),
    "quasi-newton-window": Solver("jacobi", window=7, neighbours=(1, 5, 200)),
}
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())


@pytest.fixture(params=cpu_backends("block_jacobi"))
def inverse(request):
    return lambda *args, **options: block_inverse(*args, **options, backend=request.param)


def coupled(B, T, D=3, seed=0, **changes):
    """Return noise, weights, spec and context of a block whose tokens depend on each other strongly."""
    torch.manual_seed(seed)
    spec = BlockSpec(
        token_dim=D, channels=32, layers=2, heads=2, head_dim=16, kv_heads=2, mlp_dim=64, **{"positions": T, **changes}
    )
    z, weights, context = tame_block(spec, B, T)
    weights["proj_out.weight"] = weights["proj_out.weight"] * 2
    return z, weights, spec, context


@every_wide_spec
@every_solver
@pytest.mark.parametrize("guidance", [None, 0.7])
@pytest.mark.usefixtures("poisoned_memory")
def test_matches_sequential(spec, solver, guidance, inverse):
    z, w, context = tame_block(spec, 3, 23, 4, copies=1 if guidance is None else 2)
    options = {} if guidance is None else {"guidance": guidance, "rule": "starflow", "temperature": 0.8}
    expected = inverse(z, w, spec, **context, **options).x
    found = inverse(z, w, spec, **context, **options, solver=solver)
    x, report = found.x, found.report
    torch.testing.assert_close(x, expected, rtol=0, atol=2e-5)
    assert report.method == "jacobi" and report.residual <= solver.tol and report.fallbacks == 0
    assert report.tokens == report.sweeps.sum() and report.passes <= 23 and report.seconds > 0
    assert (report.sweeps[:, 0 if spec.start else 1 :] >= 1).all()


@every_wide_spec
@every_solver
def test_matches_sequential_in_float64(spec, solver):
    z, w, context = tame_block(spec, 2, 23, 4)
    z, w, context = z.double(), {n: t.double() for n, t in w.items()}, {n: t.double() for n, t in context.items()}
    expected = block_inverse(z, w, spec, **context).x
    solver = dataclasses.replace(solver, tol=1e-12)
    x = block_inverse(z, w, spec, **context, solver=solver).x
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-10)


@needs_native
@every_wide_spec
@every_solver
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [1, 2, 40])
def test_without_a_tolerance_has_the_bits_of_sequential(spec, solver, dtype, T):
    z, w, context = tame_block(spec, 3, T, 5, dtype, copies=2)
    options = {**context, "guidance": 0.5}
    expected = block_inverse(z, w, spec, **options, backend="native").x
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        x = block_inverse(z, w, spec, **options, backend="native", solver=dataclasses.replace(solver, tol=0)).x
        assert torch.equal(x, expected)


@every_solver
def test_a_sample_alone_has_the_same_bits_and_sweeps(solver, inverse):
    z, w, spec, context = coupled(5, 40)
    found = inverse(z, w, spec, **context, solver=solver)
    x, report = found.x, found.report
    for i in range(5):
        one = slice(i, i + 1)
        found = inverse(z[one], w, spec, **rows(context, one), solver=solver)
        alone, own = found.x, found.report
        assert torch.equal(alone[0], x[i])
        assert torch.equal(own.sweeps[0], report.sweeps[i])


def test_a_window_slides_and_modules_do_not(inverse):
    z, w, spec, context = coupled(1, 40)
    slide, modules = (inverse(z, w, spec, **context, solver=Solver("jacobi", 8, slide=s)).report for s in (True, False))
    assert slide.passes < modules.passes < 40
    # Modules begin at multiples of their size: their last tokens take part in all passes of the module.
    ends = modules.sweeps[0].view(5, 8)[:, -1]
    assert ends.sum() == modules.passes


def test_quasi_newton_takes_fewer_passes(inverse):
    """The parameters are linear in the previous token alone, so two sweeps determine the model."""
    z, w, spec, context = coupled(4, 64, rotary="none")
    for name in w:
        if name.endswith(("proj.weight", "down.weight")):
            w[name] = torch.zeros_like(w[name])
    w = {name: torch.zeros_like(t) if name == "pos_embed" else t for name, t in w.items()}
    tol = 1e-6
    plain, newton = (
        inverse(z, w, spec, **context, solver=Solver("jacobi", tol=tol, neighbours=k)).report for k in ((), (1,))
    )
    assert newton.passes <= 0.6 * plain.passes


def test_the_callers_guess_is_the_start(inverse):
    z, w, spec, context = coupled(2, 30)
    x = inverse(z, w, spec, **context).x
    found = inverse(z, w, spec, **context, solver=Solver("jacobi", tol=1e-5), guess=x)
    again, report = found.x, found.report
    torch.testing.assert_close(again, x, rtol=0, atol=1e-5)
    assert report.passes <= 2
    assert (
        torch.equal(report.sweeps[:, 1:], torch.full((2, 29), report.passes, dtype=torch.int32)) or report.passes == 2
    )


@every_solver
def test_a_window_that_overflows_is_solved_token_by_token(solver, inverse):
    z, w, spec, context = coupled(2, 20)
    guess = z.clone()
    guess[1] = 1e38
    found = inverse(z, w, spec, **context, solver=solver, guess=guess)
    x, report = found.x, found.report
    torch.testing.assert_close(x, inverse(z, w, spec, **context).x, rtol=0, atol=2e-5)
    assert report.fallbacks >= 1


def test_diverged_values_are_not_waited_for(inverse):
    """Finite values far beyond the noise count as diverged."""
    z, w, spec, context = coupled(2, 20)
    w["proj_in.weight"] = w["proj_in.weight"] * 0
    w["proj_out.weight"] = w["proj_out.weight"] * 0
    w["proj_out.bias"] = torch.cat([torch.full((3,), 16.0), torch.zeros(3)])
    found = inverse(z, w, spec, **context, solver=Solver("jacobi"))
    x, report = found.x, found.report
    torch.testing.assert_close(x, inverse(z, w, spec, **context).x)
    assert report.fallbacks == 2 and report.passes == 20


@every_solver
def test_what_no_solver_can_solve_is_an_error(solver, inverse):
    z, w, spec, context = coupled(3, 12)
    context["cond"][1] = float("3e38")
    with pytest.raises(ValueError, match="not finite at token 1 of sample 1"):
        inverse(z, w, spec, **context, solver=solver)


def test_progress_counts_tokens_and_may_end_the_call(inverse):
    z, w, spec, context = coupled(3, 20)
    seen = []
    solver = Solver("jacobi", 4)
    inverse(z, w, spec, **context, solver=solver, progress=lambda *numbers: seen.append(numbers))
    assert seen[-1] == (60, 60) and seen == sorted(seen)

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        inverse(z, w, spec, **context, solver=solver, progress=stop)


@needs_native
@every_solver
def test_parts_of_a_batch_have_the_same_bits(solver, monkeypatch):
    spec = WIDE_SPECS["starflow-text"]
    z, w, context = tame_block(spec, 5, 30, 6, copies=2)
    options = {**context, "guidance": 1.0, "solver": solver, "backend": "native"}
    whole = block_inverse(z, w, spec, **options).x
    monkeypatch.setenv("STARFLOW_CACHE_GB", "0.00005")
    assert torch.equal(block_inverse(z, w, spec, **options).x, whole)


@pytest.mark.parametrize("start", [True, False])
def test_one_token_and_no_rows(start, inverse):
    z, w, spec, context = coupled(2, 1, start=start)
    found = inverse(z, w, spec, **context, solver=Solver("jacobi"))
    x, report = found.x, found.report
    torch.testing.assert_close(x, inverse(z, w, spec, **context).x)
    assert report.passes == int(start)
    found = inverse(z[:0], w, spec, **rows(context, slice(0)), solver=Solver("jacobi"))
    x, report = found.x, found.report
    assert x.shape == (0, 1, 3) and (report.passes, report.tokens, report.residual) == (0, 0, 0)


def test_sequential_has_a_report_too(inverse):
    z, w, spec, context = coupled(2, 9)
    found = inverse(z, w, spec, **context)
    x, report = found.x, found.report
    assert torch.equal(x, inverse(z, w, spec, **context).x)
    assert (report.method, report.passes, report.tokens) == ("sequential", 8, 16)
    assert report.sweeps.tolist() == [[0, *[1] * 8]] * 2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "newton"}, "method='newton'"),
        ({"guess": "ones"}, "guess='ones'"),
        ({"window": -1}, "window=-1"),
        ({"window": True}, "window=True"),
        ({"window": 2.5}, "window=2.5"),
        ({"tol": -1.0}, "tol=-1.0"),
        ({"tol": float("nan")}, "tol=nan"),
        ({"tol": 10**400}, "tol=10000.*: expected a finite number >= 0"),
        ({"neighbours": (0, 1)}, "neighbours"),
        ({"neighbours": (4, 1)}, "neighbours"),
        ({"neighbours": (2**70,)}, "neighbours=.*: expected ascending distances from 1 to 2"),
    ],
)
def test_wrong_solvers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Solver(**{"method": "jacobi", **options})


@pytest.mark.parametrize(
    "options",
    [{"tol": "1"}, {"tol": True}, *({"neighbours": k} for k in (3, "1", (1.5,), (1, "a"), (True,)))],
    ids=repr,
)
def test_options_of_a_solver_that_are_no_numbers_are_refused(options):
    with pytest.raises(TypeError, match=f"^{next(iter(options))}=.*: expected a"):
        Solver("jacobi", **options)


@pytest.mark.parametrize("number", [np.int64, torch.tensor])
def test_a_solver_takes_numbers_of_numpy_and_torch(number):
    solver = Solver("jacobi", number(3), tol=number(1), neighbours=(number(1), number(4)))
    assert repr(solver) == repr(Solver("jacobi", 3, tol=1.0, neighbours=(1, 4)))


def test_wrong_guesses_are_refused():
    z, w, spec, context = coupled(2, 9)
    for guess, error in ((z[:1], ValueError), (z * float("nan"), ValueError), (z.int(), TypeError)):
        with pytest.raises(error, match="guess"):
            block_inverse(z, w, spec, **context, solver=Solver("jacobi"), guess=guess)
    with pytest.raises(ValueError, match="guess"):
        block_inverse(z, w, spec, **context, guess=z)


def test_opcheck():
    z, w, spec, context = coupled(2, 9)
    given = [context.get(n) for n in ("cond", "prefix", "cos", "sin")]
    arguments = (*given, None, [1, 3], spec.to_json(), "tarflow", 1.0, 4, True, 1e-6, "int8")
    torch.library.opcheck(torch.ops.starflow.block_jacobi.default, (z, z, list(w.values()), *arguments))


@needs_native
def test_strided_inputs_are_read_and_left():
    z, w, spec, context = coupled(2, 21, flip=True)
    wide = torch.stack([z, torch.full_like(z, float("nan"))], dim=-1)[..., 0]
    before = wide.clone()
    x = block_inverse(wide, w, spec, **context, solver=Solver("jacobi", 5), backend="native").x
    assert torch.equal(wide, before)
    again, _ = block_forward(x, w, spec, **context)
    torch.testing.assert_close(again, z, rtol=0, atol=1e-4)
