"""Checks of sampling on every GPU backend that takes a block."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator

import torch

from starflow_kernels import Inverse, Solver, backends, block_forward, block_inverse

from .bench import Bench, attempt, refusals_skipped
from .runner import Skip
from .sampling_cases import WEIGHTS, Block, Checked, Problem, Weights, make

SOLVERS = {
    "Jacobi, window of 5": Solver("jacobi", window=5),
    "quasi-Newton, modules of 4": Solver("jacobi", window=4, slide=False, neighbours=(1, 3)),
}


def inverse(block: Block, z: torch.Tensor, backend: str | None, **options) -> Inverse:
    """Run block_inverse on a backend; raise Skip if the backend cannot run it."""
    with refusals_skipped():
        return block_inverse(z, block.weights, block.spec, **block.context, **options, backend=backend)


def rows_of(problem: Problem, rows: slice) -> Problem:
    """Return some samples of a problem of one block."""
    (block,), z = problem
    context = {
        name: value.unflatten(0, (block.copies, len(z)))[:, rows].flatten(0, 1) if name in ("cond", "prefix") else value
        for name, value in block.context.items()
    }
    return Problem([block._replace(context=context)], z[rows])


class Subject:
    """A block and noise in one kind of weights, with the results of a backend and of the specification.

    Args:
        checked: the block.
        weights: kind of weights.
        backend: name of the backend.
        bench: where everything runs.
        tokens: number of tokens; 0 takes that of `checked`.
        seed: of weights and noise.
    """

    def __init__(self, checked: Checked, weights: Weights, backend: str, bench: Bench, tokens: int = 0, seed: int = 0):
        self.checked, self.weights, self.backend, self.bench = checked, weights, backend, bench
        sizes = checked.samples, tokens or checked.tokens, torch.float32, bench.device
        self.problem = make([checked.spec], *sizes, seed=seed, **checked.options).to(weights.dtype)
        self.block, self.z = self.problem.blocks[0], self.problem.z

    def run(self, rows: slice = slice(None)) -> torch.Tensor:
        """Return the data of some rows."""
        return self.run_problem(rows_of(self.problem, rows))()

    def run_problem(self, problem: Problem) -> Callable:
        """Return a function that solves another problem in the same way."""
        return lambda: inverse(problem.blocks[0], problem.z, self.backend, **self.weights.options).x

    @functools.cached_property
    def first(self) -> torch.Tensor:
        """Data of the first call."""
        return self.run()

    @functools.cached_property
    def usual(self) -> torch.Tensor:
        """Data by the specification in these weights."""
        return inverse(self.block, self.z, "reference", **self.weights.options).x

    @functools.cached_property
    def exact(self) -> torch.Tensor:
        """Data by the specification in float64, from the same rounded weights."""
        wide = self.problem.to(torch.float64)
        return inverse(wide.blocks[0], wide.z, "reference", **self.weights.options).x

    def compare(self, found: torch.Tensor, slack: float = 0.0) -> str:
        """Check the error contract, with some slack for a solver; return the share of the allowed error."""
        if not torch.isfinite(found).all():
            raise AssertionError("the result is not finite")
        size = self.exact.abs().max().item()
        error, allowed = ((t - self.exact).abs().max().item() for t in (found, self.usual))
        bound = 2 * (allowed + torch.finfo(self.weights.dtype).eps * size) + slack * max(1.0, size)
        if error > bound:
            raise AssertionError(f"{error / bound:.2f} of the allowed error")
        return f"{error / bound:.2f} of the allowed error"


def equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise AssertionError unless both have the same bits."""
    if not torch.equal(found, expected):
        raise AssertionError(f"largest difference {(found - expected).abs().max().item():.2e}")


def contract(s: Subject) -> str:
    """Compare with float64, with NaN in all unwritten memory."""
    with s.bench.poisoned():
        return s.compare(s.first)


def one_token(s: Subject) -> str:
    """Check the error contract at T = 1."""
    alone = Subject(s.checked, s.weights, s.backend, s.bench, tokens=1)
    return alone.compare(alone.first)


def second_call(s: Subject) -> None:
    """Require the same bits from a kept session, with NaN in all its buffers and in all unwritten memory."""
    expected = s.first
    if s.backend == "triton":
        from starflow_kernels.block.triton import sequential

        for session in sequential.kept_sessions:
            for value in vars(session).values():
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    value.fill_(float("nan"))
    with s.bench.poisoned():
        equal(s.run(), expected)


def batch_invariant(s: Subject) -> None:
    """Require the same bits for rows alone and in the batch."""
    with s.bench.products_by_rows():
        whole = s.run()
        for rows in (slice(0, 1), slice(1, s.checked.samples)):
            equal(s.run(rows), whole[rows])


def other_stream(s: Subject) -> None:
    """Run a call on another stream, right after one on the usual stream."""
    if s.bench.dry:
        raise Skip("it needs a GPU")
    expected, stream = s.first, torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    before = s.run()
    with torch.cuda.stream(stream):
        found = s.run()
    after = s.run()
    torch.cuda.synchronize()
    for result in (before, found, after):
        equal(result, expected)


def two_models(s: Subject) -> None:
    """Run two models in turns and require that each repeats its bits."""
    other, expected = Subject(s.checked, s.weights, s.backend, s.bench, seed=1), s.first
    if torch.equal(other.first, expected):
        raise AssertionError("both give the same")
    equal(s.run(), expected)
    equal(other.run(), other.first)


def round_trip(s: Subject) -> str:
    """Map the data back to noise and compare the distance with that of the specification."""
    if s.block.copies == 2 or "quantize" in s.weights.options:
        raise Skip("under guidance, or by weights of one byte, it is not the inverse of the density pass")
    ours, usual = (
        (block_forward(x, s.block.weights, s.block.spec, **s.block.context, backend=backend)[0] - s.z).abs().max()
        for x, backend in ((s.first, None), (s.usual, "reference"))
    )
    bound = 2 * (usual.item() + torch.finfo(s.weights.dtype).eps * s.z.abs().max().item())
    if not ours.item() <= bound:
        raise AssertionError(f"{ours.item() / bound:.2f} of the allowed distance")
    return f"{ours.item() / bound:.2f} of the allowed distance"


def few_launches(s: Subject) -> str:
    """Require at most five kernels per layer and one per token; the CUDA backend has one for all tokens."""
    a_step, layers = launches_a_step(s.problem, s.run_problem, s.bench), s.checked.spec.layers
    if a_step is None:
        raise Skip("no kernel was seen")
    if a_step > (0 if s.backend == "cuda" else 5 * layers + 1):
        raise AssertionError(f"{a_step:g} kernels per token of {layers} layers")
    return f"{a_step:g} kernels per token of {layers} layers"


def launches_a_step(problem: Problem, run: Callable[[Problem], Callable], bench: Bench) -> float | None:
    """Return the kernels per token step, or None if none is seen.

    The number is the difference between calls of few and of some more tokens. run(problem) returns a function without
    arguments.
    """
    few, more = (2, 3) if bench.dry else (8, 16)
    counts = []
    for tokens in (few, more):
        call = run(problem.short(tokens))
        if not bench.dry:
            call()
        try:
            counts.append(bench.launched(call))
        except (AssertionError, RuntimeError) as error:
            print(f"kernels are not counted: {error}")
            return None
    return (counts[1] - counts[0]) / (more - few) if counts[0] else None


CHECKS = {
    "error contract": contract,
    "second call, NaN in the session": second_call,
    "kernels per token": few_launches,
    "T = 1": one_token,
    "batch invariance": batch_invariant,
    "another stream": other_stream,
    "two models": two_models,
    "round trip": round_trip,
}
BRIEF = ("error contract", "second call, NaN in the session", "kernels per token")


def check_inverse(name: str, block: Checked, bench: Bench, names: Iterable[str]) -> Iterator[dict]:
    """Yield a row per backend, weights and named check; one with the reason if a backend cannot run the block."""
    shape = f"{name}, {block.samples} x {block.tokens}"
    for backend in [backend for backend in backends()["block_inverse"] if backend not in ("reference", "native")]:
        for kind in block.weights:
            row = {"op": f"block_inverse, {backend}", "shape": shape, "dtype": kind}
            subject = Subject(block, WEIGHTS[kind], backend, bench)
            for check in names:
                result, note = attempt(CHECKS[check], subject)
                if result == "skipped" and check == "error contract":
                    yield {**row, "check": "all", "result": result, "note": note}
                    break
                yield {**row, "check": check, "result": result, "note": note}


def check_jacobi(name: str, block: Checked, bench: Bench) -> Iterator[dict]:
    """Check the parallel inverse on every backend that takes the block, without and with neighbours."""
    kind = block.weights[0]
    subject = Subject(block, WEIGHTS[kind], "reference", bench)
    for backend in backends()["block_jacobi"]:
        for check, solver in SOLVERS.items():

            def solved(backend=backend, solver=solver):
                found = inverse(subject.block, subject.z, backend, solver=solver)
                return f"{subject.compare(found.x, slack=1e-5)}, {found.report.passes} passes for {block.tokens} tokens"

            row = {
                "op": f"block_jacobi, {backend}",
                "shape": f"{name}, {block.samples} x {block.tokens}",
                "dtype": kind,
            }
            result, note = attempt(solved)
            yield {**row, "check": check, "result": result, "note": note}


def checks(name: str, block: Checked, bench: Bench, brief: bool = False) -> Iterator[dict]:
    """Yield the rows of a block: all checks that it is made for, or only the error contract of each kernel."""
    names = CHECKS if block.thorough else BRIEF
    yield from check_inverse(name, block, bench, ["error contract"] if brief else names)
    if block.thorough:
        yield from check_jacobi(name, block, bench)
