"""What benchmarks.gpu checks of the sampling direction, on every backend that takes a block."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from starflow_kernels import Solver, backends, block_forward, block_inverse

from .bench import Bench, Clock, Skip, attempt
from .sampling_cases import WEIGHTS, Block, Checked, Problem, Weights, checked, make

SOLVERS = {
    "Jacobi, window of 5": Solver("jacobi", window=5),
    "quasi-Newton, modules of 4": Solver("jacobi", window=4, slide=False, neighbours=(1, 3)),
}


def inverse(block: Block, z: torch.Tensor, backend: str | None, **options) -> torch.Tensor:
    """block_inverse by a backend; Skip where it cannot."""
    try:
        return block_inverse(z, block.weights, block.spec, **block.context, **options, backend=backend)
    except ValueError as error:
        if "cannot run" in str(error):
            raise Skip(str(error).split(": ", 1)[1]) from error
        raise


def rows_of(problem: Problem, rows: slice) -> Problem:
    """Some samples of a problem of one block."""
    (block,), z = problem
    context = {
        name: value.unflatten(0, (block.copies, len(z)))[:, rows].flatten(0, 1) if name in ("cond", "prefix") else value
        for name, value in block.context.items()
    }
    return Problem([block._replace(context=context)], z[rows])


class Subject:
    """A block and noise in some weights, what a backend makes of it, and what is right."""

    def __init__(self, of: Checked, weights: Weights, backend: str, bench: Bench, tokens: int = 0, seed: int = 0):
        self.of, self.weights, self.backend, self.bench = of, weights, backend, bench
        drawn = of.samples, tokens or of.tokens, torch.float32, bench.device
        self.problem = make([of.spec], *drawn, seed=seed, **of.options).to(weights.dtype)
        self.block, self.z = self.problem.blocks[0], self.problem.z

    def run(self, rows: slice = slice(None)) -> torch.Tensor:
        """The data of some rows."""
        return self.run_problem(rows_of(self.problem, rows))()

    def run_problem(self, problem: Problem) -> Callable:
        """The same call for another problem."""
        return lambda: inverse(problem.blocks[0], problem.z, self.backend, **self.weights.options)

    @functools.cached_property
    def first(self) -> torch.Tensor:
        """The data by a first call."""
        return self.run()

    @functools.cached_property
    def usual(self) -> torch.Tensor:
        """The specification in these weights."""
        return inverse(self.block, self.z, "reference", **self.weights.options)

    @functools.cached_property
    def exact(self) -> torch.Tensor:
        """The specification in float64, of weights that are rounded alike."""
        wide = self.problem.to(torch.float64)
        return inverse(wide.blocks[0], wide.z, "reference", **self.weights.options)

    def compare(self, found: torch.Tensor, slack: float = 0.0) -> str:
        """The error contract, and of a solver the slack that it asks for."""
        if not torch.isfinite(found).all():
            raise AssertionError("the result is not finite")
        size = self.exact.abs().max().item()
        error, allowed = ((t - self.exact).abs().max().item() for t in (found, self.usual))
        bound = 2 * (allowed + torch.finfo(self.weights.dtype).eps * size) + slack * max(1.0, size)
        if error > bound:
            raise AssertionError(f"{error / bound:.2f} of the allowed error")
        return f"{error / bound:.2f} of the allowed error"


def equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise unless they are the same to the bit."""
    if not torch.equal(found, expected):
        raise AssertionError(f"largest difference {(found - expected).abs().max().item():.2e}")


def contract(s: Subject) -> str:
    """Against float64, with NaN in memory that nobody has written."""
    with s.bench.poisoned():
        return s.compare(s.first)


def one_token(s: Subject) -> str:
    """T = 1."""
    alone = Subject(s.of, s.weights, s.backend, s.bench, tokens=1)
    return alone.compare(alone.first)


def second_call(s: Subject) -> None:
    """The same bits by the session that is kept, with NaN in all its buffers and in memory that nobody has written."""
    expected = s.first
    if s.backend == "triton":
        from starflow_kernels.block.triton import sequential

        for _, session in sequential._sessions._kept.values():
            for value in vars(session).values():
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    value.fill_(float("nan"))
    with s.bench.poisoned():
        equal(s.run(), expected)


def batch_invariant(s: Subject) -> None:
    """Rows alone and in the batch, to the bit."""
    with s.bench.products_by_rows():
        whole = s.run()
        for rows in (slice(0, 1), slice(1, s.of.samples)):
            equal(s.run(rows), whole[rows])


def other_stream(s: Subject) -> None:
    """A call on a stream of its own, right behind one on the usual stream."""
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
    """Two models in turns: each gives its own bits again."""
    other, expected = Subject(s.of, s.weights, s.backend, s.bench, seed=1), s.first
    if torch.equal(other.first, expected):
        raise AssertionError("both give the same")
    equal(s.run(), expected)
    equal(other.run(), other.first)


def round_trip(s: Subject) -> str:
    """block_forward of the data is the noise, as nearly as for the specification."""
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
    """At most five kernels a layer and one for the rest of a token; on chip one for all tokens."""
    a_step, layers = launches_a_step(s.problem, s.run_problem, s.bench), s.of.spec.layers
    if a_step is None:
        raise Skip("no kernel was seen")
    if a_step > (0 if s.backend == "cuda" else 5 * layers + 1):
        raise AssertionError(f"{a_step:g} kernels a token of {layers} layers")
    return f"{a_step:g} kernels a token of {layers} layers"


def launches_a_step(problem: Problem, run: Callable[[Problem], Callable], bench: Bench) -> float | None:
    """Kernels of a token step: the difference between calls of few and of some more tokens, None where none is seen;
    run(problem) gives a function without arguments."""
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
    "kernels a token": few_launches,
    "T = 1": one_token,
    "batch invariance": batch_invariant,
    "another stream": other_stream,
    "two models": two_models,
    "round trip": round_trip,
}
BRIEF = ("error contract", "second call, NaN in the session", "kernels a token")


def check_inverse(name: str, of: Checked, bench: Bench, clock: Clock) -> Iterator[dict]:
    """A row a backend, weights and check; one for a backend that cannot run the block, with the reason."""
    shape = f"{name}, {of.samples} x {of.tokens}"
    for backend in [backend for backend in backends()["block_inverse"] if backend not in ("reference", "native")]:
        for kind in of.weights:
            row = {"op": f"block_inverse, {backend}", "shape": shape, "dtype": kind}
            if clock.left() < 0:
                yield {**row, "check": "all", "result": "skipped", "note": "the time for checks is spent"}
                continue
            subject = Subject(of, WEIGHTS[kind], backend, bench)
            for check in CHECKS if of.thorough else BRIEF:
                result, note = attempt(CHECKS[check], subject)
                if result == "skipped" and check == "error contract":
                    yield {**row, "check": "all", "result": result, "note": note}
                    break
                yield {**row, "check": check, "result": result, "note": note}


def check_jacobi(name: str, of: Checked, bench: Bench, clock: Clock) -> Iterator[dict]:
    """The parallel inverse by every backend that takes the block, plain and with neighbours."""
    kind = of.weights[0]
    subject = Subject(of, WEIGHTS[kind], "reference", bench)
    for backend in backends()["block_jacobi"]:
        for check, solver in SOLVERS.items():

            def solved(backend=backend, solver=solver):
                options = {"solver": solver, "return_report": True}
                x, report = inverse(subject.block, subject.z, backend, **options)
                return f"{subject.compare(x, slack=1e-5)}, {report.passes} passes for {of.tokens} tokens"

            row = {"op": f"block_jacobi, {backend}", "shape": f"{name}, {of.samples} x {of.tokens}", "dtype": kind}
            result, note = attempt(solved) if clock.left() > 0 else ("skipped", "the time for checks is spent")
            yield {**row, "check": check, "result": result, "note": note}


def checks(bench: Bench, clock: Clock) -> Iterator[dict]:
    """All rows."""
    for name, of in checked(bench.dry).items():
        yield from check_inverse(name, of, bench, clock)
        if of.thorough:
            yield from check_jacobi(name, of, bench, clock)
