"""Times of sampling: the package, a decoder in plain PyTorch and the released loop.

The plain decoder of benchmarks.peers.static_cache first solves a case sequentially in float32, or in float64 for
float32 weights. Every other result is compared with that one; a code whose error is too large gets no time. The allowed
error is twice that of the plain decoder in the same weights, plus rounding.
"""

from __future__ import annotations

import functools
import gc
import math
import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from starflow_kernels import Solver, backends

from ..peers.released import released_block, step_seconds
from ..peers.static_cache import PlainDecoder
from .bench import Bench, attempt
from .runner import Clock, Skip
from .sampling_cases import WEIGHTS, Block, Case, Problem, Weights
from .sampling_checks import inverse, launches_a_step

REPEATS = 5
# Tokens of the short call that predicts the time of a whole one.
TRIED = 16
# Cache lengths at which steps of the released loop are timed if the whole loop takes too long.
LENGTHS = 8
# Tokens of the released loop that are then compared.
COMPARED = 33
# Error of the released loop in units of the allowed error: it computes more in narrow dtypes.
RELEASED_ERROR = 10
# Additional error of the parallel inverse.
PARALLEL_ERROR = 1e-3
# Tolerance of its sweeps, and tokens per window.
PARALLEL_TOL = 1e-4
WINDOWS = (32, 64)

Run = Callable[[], torch.Tensor]


class Code(NamedTuple):
    """A way to solve a problem.

    Args:
        start: start(problem) returns a function that solves it, whose first call may take longer.
        slack: additional allowed error.
        most: allowed kernels per token for a number of layers; None to leave them uncounted.
    """

    start: Callable[[Problem], Run]
    slack: float = 0.0
    most: Callable[[int], float] | None = None


def plain(attention: str, steps: int | None = None) -> Code:
    """Return the decoder in plain PyTorch; steps: per block, None for all."""

    def start(problem: Problem) -> Run:
        B, T, _ = problem.z.shape
        decoders = {
            id(block): PlainDecoder(
                block.weights, block.spec, B, T, prefix=block.prefix, copies=block.copies,
                rule=block.context.get("rule", "tarflow"), attention=attention,
            )
            for block in problem.blocks
        }  # fmt: skip

        def run(block: Block, z: torch.Tensor) -> torch.Tensor:
            return decoders[id(block)](z, **{n: v for n, v in block.context.items() if n != "rule"}, steps=steps)

        return lambda: problem.solve(run)

    return Code(start)


class Ours:
    """Solution of a problem by `block_inverse` on a backend.

    `passes` counts the passes of a parallel solver through the networks of all blocks in the last call.

    Args:
        problem: blocks and noise.
        backend: name of the backend.
        options: further arguments of `block_inverse`.
    """

    def __init__(self, problem: Problem, backend: str, options: dict):
        self.problem, self.backend, self.options, self.passes = problem, backend, options, 0

    def __call__(self) -> torch.Tensor:
        self.passes = 0
        return self.problem.solve(self.invert)

    def invert(self, block: Block, z: torch.Tensor) -> torch.Tensor:
        """Return the data of one block and count passes."""
        found = inverse(block, z, self.backend, **self.options)
        if "solver" in self.options:
            self.passes += found.report.passes
        return found.x


def ours(backend: str, weights: Weights, most: Callable[[int], float] | None, **options) -> Code:
    """Return `block_inverse` on a backend."""
    options = {**weights.options, **options}
    return Code(lambda problem: Ours(problem, backend, options), PARALLEL_ERROR if "solver" in options else 0.0, most)


def codes(weights: Weights) -> dict[str, Code]:
    """Return the codes that are timed beside the released loop."""
    return {
        "ours, triton": ours("triton", weights, lambda layers: 5 * layers + 1),
        "ours, cuda": ours("cuda", weights, lambda layers: 0),
        "plain decoder, fused attention": plain("fused"),
        "plain decoder, products": plain("products"),
    }


def parallel_codes(weights: Weights, batch: int, grid: tuple[int, int], neighbours: Callable) -> dict[str, Code]:
    """Return the parallel inverses on every backend; the reference, one sample at a time, only at batch 1."""
    solvers = {}
    for backend in backends()["block_jacobi"]:
        for window in WINDOWS if backend != "reference" or batch == 1 else ():
            for name, near in (("Jacobi", ()), ("quasi-Newton", neighbours(grid, window))):
                solver = Solver("jacobi", window=window, tol=PARALLEL_TOL, neighbours=near)
                solvers[f"{name}, window {window}, {backend}"] = ours(backend, weights, None, solver=solver)
    return solvers


def difference(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return max |found - exact|; raise AssertionError if a value is not finite."""
    if not torch.isfinite(found).all():
        raise AssertionError("the result is not finite")
    return (found.double() - exact.double()).abs().max().item()


class Timing:
    """One problem in one kind of weights, with its exact solution; raises Skip if the clock has no time for that.

    Args:
        name: of the problem.
        kind: of weights.
        problem: blocks and noise.
        bench: where everything runs.
        ceilings: measured rates of the device.
        clock: seconds that are left.
        resident: see benchmarks.floor.
    """

    def __init__(self, name: str, kind: str, problem: Problem, bench: Bench, ceilings: dict, clock, resident: bool):
        self.weights, self.problem, self.bench, self.clock = WEIGHTS[kind], problem, bench, clock
        self.work = problem.work(self.weights, resident)
        self.row = {
            "problem": name,
            "weights": kind,
            "blocks": len(problem.blocks),
            "layers": problem.blocks[-1].spec.layers,
            "steps": self.work.steps,
            "floor_seconds": self.work.seconds(ceilings, self.weights.dtype),
        }
        self.wide = torch.float64 if self.weights.dtype == torch.float32 else torch.float32
        wide = problem.to(self.wide)
        if not bench.dry:
            steps = min(TRIED, self.work.steps // len(problem.blocks))
            few = plain("products", steps).start(wide.last())
            few()
            self.afford(bench.wall(few)[1] / max(1, steps) * self.work.steps)
        self.exact = plain("products").start(wide)()
        found, self.usual = bench.wall(plain("products").start(problem))
        error = difference(found, self.exact)
        self.allowed = 2 * (error + torch.finfo(self.weights.dtype).eps * self.exact.abs().max().item())

    def afford(self, seconds: float) -> None:
        """Raise Skip if two calls of so many seconds would exceed the clock."""
        needed, left = 2 * max(seconds, self.row["floor_seconds"]), self.clock.left()
        if needed > left:
            raise Skip(f"it takes {needed:.1f} s at least, {max(0, left):.1f} s are left")

    def check(self, found: torch.Tensor, slack: float) -> float:
        """Return the error; raise AssertionError if it is too large."""
        error = difference(found, self.exact)
        if error > self.allowed + slack and self.weights.exact:
            raise AssertionError(f"error {error:.2e}, allowed is {self.allowed + slack:.2e}")
        return error

    def measure(self, code: Code, seconds: float) -> dict:
        """Return the times of a code: its first call, and the median of later ones within about `seconds`."""
        launched, layers, before = None, self.row["layers"], self.bench.allocated()
        if not self.bench.dry:
            short = self.problem.short(TRIED)
            run = code.start(short)
            run()
            few = self.bench.wall(run)[1] / max(1, short.work(self.weights).steps) * self.work.steps
            self.afford(max(few, self.usual / 4))
        if code.most:
            launched = launches_a_step(self.problem, code.start, self.bench)
            if launched is not None and launched > code.most(layers):
                raise AssertionError(f"{launched:g} kernels per token of {layers} layers")
        run = None
        release(self.bench)
        seconds = min(seconds, self.clock.left())
        return {**self.timed(code.start, code.slack, seconds, before), "launches": launched}

    def timed(self, start: Callable[[Problem], Run], slack: float, seconds: float, before: int) -> dict:
        """Return times and error of start(problem); before: bytes allocated without it."""
        bench, clock = self.bench, Clock(seconds)
        if not bench.dry:
            torch.cuda.reset_peak_memory_stats()
        run = start(self.problem)
        found, first = bench.wall(run)
        peak = None if bench.dry else torch.cuda.max_memory_allocated() - before
        error, times = self.check(found, slack), []
        while not times or (len(times) < REPEATS and clock.left() > statistics.median(times) and not bench.dry):
            found, spent = bench.wall(run)
            times.append(spent)
        self.check(found, slack)
        result = {"seconds": statistics.median(times), "repeats": len(times), "first_seconds": first, "error": error}
        if getattr(run, "passes", 0):  # the floor is that of token steps
            result |= {"passes": run.passes, "floor_seconds": None}
        return {**result, "peak_bytes": peak}

    @torch.no_grad()
    def released(self, peer, seconds: float) -> dict:
        """Return the times of the released loop, or of steps at evenly spaced cache lengths if it takes too long."""
        self.afford(self.usual)
        before = self.bench.allocated()
        own, z, T = self.problem.blocks, self.problem.z, self.problem.z.shape[1]
        blocks = [released_block(peer, block.weights, block.spec) for block in own]
        if any(block is None for block in blocks):
            raise Skip("the released code has no such block")
        by_id, last = {id(block): theirs for block, theirs in zip(own, blocks)}, blocks[-1]
        lengths = torch.linspace(0, T - 2, min(LENGTHS, T - 1)).long().tolist()
        narrow = self.weights.dtype != torch.float32
        with torch.autocast(self.bench.device, self.weights.dtype if narrow else torch.bfloat16, enabled=narrow):
            slowest = step_seconds(last, z, lengths[-1:], self.bench.wall)[0]
            if 2 * slowest * self.work.steps < min(seconds, self.clock.left()):
                slack = (RELEASED_ERROR - 1) * self.allowed
                run = lambda problem: lambda: problem.solve(lambda block, z: by_id[id(block)].reverse(z.clone()))  # noqa: E731
                return self.timed(run, slack, seconds, before)
            steps = step_seconds(last, z, lengths, self.bench.wall)
            some = min(T, COMPARED)
            part = slice(T - some, None) if own[-1].spec.flip else slice(some)
            found = last.reverse(z[:, part].clone())
        right = plain("products", some - 1).start(Problem([own[-1].to(self.wide)], z))()
        error = difference(found, right[:, part])
        if error > RELEASED_ERROR * self.allowed:
            raise AssertionError(f"error {error:.2e}, allowed is {RELEASED_ERROR * self.allowed:.2e}")
        said = f"from steps at {len(steps)} lengths of the cache; error of {some} tokens of a block"
        return {"seconds": statistics.mean(steps) * self.work.steps, "repeats": 1, "error": error, "note": said}


def time_problem(
    name: str,
    kind: str,
    problem: Problem,
    timed: dict[str, Code],
    peer,
    bench,
    ceilings,
    clock: Clock,
    resident: bool = False,
    released: bool = True,
) -> Iterator[dict]:
    """Time the codes of a problem; yield a row per code.

    Args:
        name: of the problem.
        kind: of weights.
        problem: blocks and noise.
        timed: name -> code.
        peer: module of the released TarFlow, or None.
        bench: where everything runs.
        ceilings: measured rates of the device.
        clock: seconds that are left, shared by the codes.
        resident: see benchmarks.floor.
        released: time the released loop too.
    """
    timing = Timing(name, kind, problem, bench, ceilings, clock, resident)
    share = clock.left() / (len(timed) + 2)
    runs = {code: functools.partial(timing.measure, function, share) for code, function in timed.items()}
    if released:
        runs["released loop"] = functools.partial(timing.released, peer, share) if peer else without_peer
    for code, run in runs.items():
        release(bench)
        result, found = attempt(run)
        yield {**timing.row, "code": code, **(found if result == "passed" else {result: found})}


def without_peer() -> None:
    """Raise Skip in place of the released loop."""
    raise Skip("it needs --peer DIR")


def time_case(case: Case, kind: str, bench: Bench, ceilings: dict, peer, clock: Clock) -> Iterator[dict]:
    """Yield the rows of a case in one kind of weights."""
    weights = WEIGHTS[kind]
    problem = case.problem(weights.dtype, bench.device)
    return time_problem(
        case.name, kind, problem, codes(weights), peer, bench, ceilings, clock, case.resident, case.released
    )


def trained(checkpoint: str, batch: int, bench: Bench, ceilings: dict, peer, clock: Clock) -> Iterator[dict]:
    """Yield the rows of a trained flow, with its parallel inverses, whose speed depends on the weights."""
    from starflow.inversion.request import neighbours

    from ..cpu.parallel import Case as Trained
    from ..cpu.parallel import load

    kind = "float32" if bench.dry else "bfloat16"
    name, flow = load(checkpoint, WEIGHTS[kind].dtype)
    flow = flow.to(bench.device)
    case = Trained(name, flow, batch)
    given = [Block(w, spec, {n: v for n, v in more.items() if v is not None}) for w, spec, more in case.blocks]
    timed = {**codes(WEIGHTS[kind]), **parallel_codes(WEIGHTS[kind], batch, flow.config.grid, neighbours)}
    return time_problem(f"{name}, batch {batch}", kind, Problem(given, case.z), timed, peer, bench, ceilings, clock)


def release(bench: Bench) -> None:
    """Free the memory that nothing refers to."""
    if not bench.dry:
        gc.collect()
        torch.cuda.empty_cache()


def markdown(rows: list[dict]) -> str:
    """Return the rows as a table; a row without a time gives the reason, and the faster plain decoder counts."""
    lines = [
        "",
        "Sampling. benchmarks/floor.py counts the floors. Errors are against sequential float32. Peak memory excludes",
        "weights and noise. A call of a few tokens compiled the kernels before the first call.",
        "",
        "| problem | weights | code | s | us per token step | floor, us | of the floor | released / this "
        "| plain / this | error | peak MiB | kernels per token | first call, s | repeats, note |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    best: dict[tuple, float] = {}
    for r in rows:
        if "seconds" in r:
            key = r["problem"], r["weights"], r["code"].split(",")[0]
            best[key] = min(best.get(key, math.inf), r["seconds"])
    for r in rows:
        where = f"| {r['problem']} | {r['weights']} | {r['code']} "
        if "seconds" not in r:
            why = next(f"{how}: {r[how]}" for how in ("failed", "skipped") if how in r)
            lines.append(f"{where}| " + "| " * 10 + why.replace("|", "/").replace("\n", " ") + " |")
            continue
        us, floor = 1e6 * r["seconds"] / r["steps"], ""
        if r["floor_seconds"] is not None:
            floor = f"{1e6 * r['floor_seconds'] / r['steps']:.1f} | {r['floor_seconds'] / r['seconds']:.0%}"
        peers = (best.get((r["problem"], r["weights"], peer)) for peer in ("released loop", "plain decoder"))
        ratios = " | ".join("" if other is None else f"{other / r['seconds']:.2f}x" for other in peers)
        memory = "" if r.get("peak_bytes") is None else f"{r['peak_bytes'] / 2**20:.0f}"
        launches = "" if r.get("launches") is None else f"{r['launches']:g}"
        said = f"{r['passes']} passes" if "passes" in r else r.get("note", "")
        first = "" if r.get("first_seconds") is None else f"{r['first_seconds']:.3f}"
        lines.append(
            f"{where}| {r['seconds']:.4f} | {us:.1f} | {floor or ' | '} | {ratios} | {r['error']:.1e} "
            f"| {memory} | {launches} | {first} | {r['repeats']} {said} |"
        )
    return "\n".join(lines) + "\n"
