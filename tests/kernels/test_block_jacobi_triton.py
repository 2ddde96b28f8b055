"""Jacobi sweeps in Triton's interpreter: TRITON_INTERPRET=1 pytest tests/kernels/test_block_jacobi_triton.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.backends import require_interpreter
from support.blocks import BLOCKS, GPU_BLOCKS, block

from starflow_kernels import Solver, block_inverse

require_interpreter()
F32 = torch.float32
ALL = Solver("jacobi", tol=1e-6)


def case(name, guided=False, rule="tarflow", dtype=F32, coupling=1.0, **sizes):
    """Return noise, weights, spec, and the options of a call."""
    torch.manual_seed(3)
    z, w, spec, context = block(BLOCKS[name], copies=1 + guided, dtype=dtype, **sizes)
    w["proj_out.weight"] = w["proj_out.weight"] * coupling
    guidance = {"guidance": torch.rand(z.shape[:2]), "rule": rule, "temperature": 0.7} if guided else {}
    return z, w, spec, {**context, **guidance}


def assert_agrees(z, w, spec, options, solver, **more):
    """Compare values up to rounding, and passes per token up to one, as rounding may change the last pass."""
    triton, reference = (
        block_inverse(z, w, spec, **options, solver=solver, backend=b, **more) for b in ("triton", "reference")
    )
    x, found, expected, plain = triton.x, triton.report, reference.x, reference.report
    torch.testing.assert_close(triton.logdet, reference.logdet, rtol=1e-2, atol=5e-2)
    half = w["proj_in.weight"].dtype != F32
    torch.testing.assert_close(x, expected, rtol=0, atol=2e-2 if half else 2e-5)
    assert found.fallbacks == plain.fallbacks and found.residual <= solver.tol
    assert (found.sweeps - plain.sweeps).abs().max() <= (4 if half else 1), (found.sweeps, plain.sweeps)
    assert abs(found.passes - plain.passes) <= (4 if half else 1) and found.tokens == found.sweeps.sum()
    return x, found


@pytest.mark.parametrize("name", GPU_BLOCKS)
def test_every_block(name):
    assert_agrees(*case(name, B=1, tokens=3, layers=1), ALL)


@pytest.mark.parametrize("solver", [Solver("jacobi", 3, guess="zero"), Solver("jacobi", 3, slide=False)], ids=str)
@pytest.mark.parametrize("name, dtype", [("tarflow-flip", F32), ("starflow-text-flip-cond", torch.float16)])
def test_windows_and_guesses(name, dtype, solver):
    solver = Solver("jacobi", solver.window, solver.slide, solver.guess, 1e-6 if dtype == F32 else 1e-3)
    assert_agrees(*case(name, dtype=dtype, B=2, tokens=6, layers=1, coupling=2), solver)


@pytest.mark.parametrize("name, rule", [("tarflow-unit", "tarflow"), ("starflow-text-flip-cond", "starflow")])
def test_guidance_and_temperature(name, rule):
    assert_agrees(
        *case(name, guided=True, rule=rule, B=2, tokens=5, layers=1, coupling=2), Solver("jacobi", 4, tol=1e-6)
    )


def test_more_keys_than_a_split_and_more_tokens_than_a_tile(monkeypatch):
    from starflow_kernels.block.triton import sequential, sizes

    monkeypatch.setattr(sequential, "kept_sessions", sequential.Sessions())
    for name, size in {"SPLIT": 16, "BLOCK_S": 16, "PASS_ROWS": 6}.items():
        monkeypatch.setattr(sizes, name, size)
    assert_agrees(*case("starflow-text", B=2, tokens=37, layers=1, coupling=2), Solver("jacobi", 18, tol=1e-6))


@pytest.mark.parametrize("name", ["tarflow", "starflow"])
def test_tokens_of_more_than_a_tile(name):
    assert_agrees(*case(name, B=1, tokens=2, layers=1, token_dim=260, coupling=0.2), ALL)


def test_samples_end_when_they_are_done():
    z, w, spec, options = case("tarflow-flip", B=3, tokens=12, layers=1, coupling=2)
    guess = block_inverse(z, w, spec, **options, backend="reference").x
    guess[0], guess[2] = 0, z[2]
    _, report = assert_agrees(z, w, spec, options, ALL, guess=guess)
    assert report.sweeps[1].max() <= 2 < report.sweeps[0].max()


@pytest.mark.parametrize("name", ["tarflow", "starflow"])
def test_one_token_and_no_rows(name):
    z, w, spec, options = case(name, B=2, tokens=1, layers=1)
    _, report = assert_agrees(z, w, spec, options, ALL)
    assert report.passes == int(spec.start)
    x = block_inverse(z[:0], w, spec, **{n: t if n in ("cos", "sin") else t[:0] for n, t in options.items()},
                      solver=ALL, backend="triton").x  # fmt: skip
    assert x.shape == (0, 1, spec.token_dim)


def test_a_window_that_diverges_goes_token_by_token():
    z, w, spec, options = case("tarflow", B=2, tokens=6, layers=1)
    guess = z.clone()
    guess[1] = 1e38
    _, report = assert_agrees(z, w, spec, options, ALL, guess=guess)
    assert report.fallbacks == 1


def test_diverged_values_are_not_waited_for():
    z, w, spec, options = case("tarflow", B=2, tokens=6, layers=1)
    w = {n: torch.zeros_like(t) if n.startswith(("proj_in.weight", "proj_out")) else t for n, t in w.items()}
    w["proj_out.bias"][: spec.token_dim] = 16.0
    _, report = assert_agrees(z, w, spec, options, Solver("jacobi", tol=0))
    assert report.fallbacks == 2 and report.passes == 6


@pytest.mark.parametrize("window", [0, 3])
def test_noise_that_no_solver_can_invert_is_an_error(window):
    z, w, spec, options = case("no-norm-no-position", B=3, tokens=4, layers=1)
    options["cond"][1] = 3e38
    with pytest.raises(ValueError, match="not finite at token 1 of sample 1"):
        block_inverse(z, w, spec, **options, solver=Solver("jacobi", window), backend="triton")


@pytest.fixture
def matmul_by_rows(monkeypatch):
    """Multiply row by row: the bits of numpy's products, which the interpreter uses, depend on the place of a row."""
    monkeypatch.setattr(np, "matmul", lambda a, b, dtype=None: (a[:, :, None] * b[None]).sum(1, dtype=dtype))


@pytest.mark.parametrize("name, guided", [("tarflow-flip", True), ("starflow-text", False)])
@pytest.mark.usefixtures("matmul_by_rows")
def test_bits_do_not_depend_on_window_or_batch(name, guided, monkeypatch):
    z, w, spec, options = case(name, guided, B=3, tokens=5, layers=1, coupling=2)

    def run(rows, solver):
        given = {n: t if n in ("cos", "sin", "rule", "temperature") else t[rows] if n == "guidance" else
                 t.unflatten(0, (-1, 3))[:, rows].flatten(0, 1) for n, t in options.items()}  # fmt: skip
        found = block_inverse(z[rows], w, spec, **given, solver=solver, backend="triton")
        return found.x, found.report

    whole, report = run(slice(None), Solver("jacobi", tol=0))
    for window in (1, 3):
        assert torch.equal(run(slice(None), Solver("jacobi", window, tol=0))[0], whole)
    x, alone = run(slice(2, 3), Solver("jacobi", tol=0))
    assert torch.equal(x[0], whole[2]) and torch.equal(alone.sweeps[0], report.sweeps[2])
    monkeypatch.setenv("STARFLOW_CACHE_GB", "1e-5")
    assert torch.equal(run(slice(None), Solver("jacobi", tol=0))[0], whole)


def test_progress_and_reuse():
    z, w, spec, options = case("starflow", B=2, tokens=6, layers=1)
    seen = []
    run = lambda n, **more: block_inverse(z[:n], w, spec, **options, solver=ALL, backend="triton", **more).x  # noqa: E731
    whole = run(2, progress=lambda *at: seen.append(at))
    assert seen == sorted(seen) and seen[-1] == (12, 12)
    assert torch.equal(run(2), whole)


@pytest.mark.parametrize(
    "name, guided, slide", [("tarflow-flip", True, True), ("starflow-text-flip-cond", False, False)]
)
def test_quasi_newton(name, guided, slide):
    solver = Solver("jacobi", 4, slide, tol=1e-6, neighbours=(1, 2))
    assert_agrees(*case(name, guided, B=2, tokens=7, layers=1, coupling=2), solver)


def test_quasi_newton_steps_are_those_of_the_reference():
    z, w, spec, options = case("tarflow", B=1, tokens=18, layers=1, coupling=3)
    plain, newton = Solver("jacobi", tol=1e-4), Solver("jacobi", tol=1e-4, neighbours=(1, 3))
    _, report = assert_agrees(z, w, spec, options, newton)
    fewer = block_inverse(z, w, spec, **options, solver=plain, backend="reference").report
    assert report.passes != fewer.passes or not torch.equal(report.sweeps, fewer.sweeps)


def test_a_linear_model_that_does_not_fit_into_registers(monkeypatch):
    """A tile has fewer inputs than the model and fewer tokens than the window."""
    from starflow_kernels.block.triton import sequential, sweeps

    for module, name, value in (
        (sweeps, "MOST_INPUTS", 16), (sweeps, "MODEL_TILE", 16), (sequential, "kept_sessions", sequential.Sessions())
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    z, w, spec, options = case("tarflow", B=1, tokens=18, layers=1, coupling=3, token_dim=9)
    newton = Solver("jacobi", tol=1e-4, neighbours=(1, 3))
    _, report = assert_agrees(z, w, spec, options, newton)
    plain = block_inverse(z, w, spec, **options, solver=Solver("jacobi", tol=1e-4), backend="reference").report
    assert report.passes != plain.passes or not torch.equal(report.sweeps, plain.sweeps)


def test_a_large_model_is_solved_by_tiles():
    from starflow_kernels.block.triton.wide_newton_kernels import solve_model

    a, x = torch.randn(48, 48), torch.randn(48, 32)
    a = a @ a.T + 4 * torch.eye(48)
    expected = torch.linalg.solve(a.double(), x.double())
    solve_model[(1,)](a, x, SIDE=48, WIDTH=16, TILE=16)
    assert (x - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_token_of_many_values_has_a_linear_model():
    sizes = {"token_dim": 70, "channels": 16, "mlp_dim": 16, "heads": 1, "kv_heads": 1}
    solver = Solver("jacobi", tol=1e-4, neighbours=(1, 2))
    assert_agrees(*case("starflow", B=1, tokens=3, layers=1, coupling=0.5, **sizes), solver)
