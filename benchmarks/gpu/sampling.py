"""What benchmarks.gpu times of the sampling direction: ours, a decoder in plain PyTorch and the released loop.

A case is first solved in float32 (float64 for float32 weights), sequentially, by the plain decoder of
benchmarks.peers.static_cache;
every other result is compared with that one, and a code whose error is not allowed has no time.
Allowed is twice the error of the plain decoder in the same weights, and rounding.
"""

from __future__ import annotations

import functools
import gc
import math
import statistics
import traceback
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from starflow_kernels import Solver, backends

from ..peers.released import released_block, step_seconds
from ..peers.static_cache import PlainDecoder
from .bench import Bench, Clock, Skip, attempt
from .sampling_cases import CASES, DRY_CASES, WEIGHTS, Block, Problem, Weights
from .sampling_checks import inverse, launches_a_step

REPEATS = 5
# Seconds without which no case is begun.
LEAST = 5
# Tokens by which the time of a call is judged before it is made.
TRIED = 16
# Of the released loop, where all of it would take too long: lengths of the cache, and tokens that are compared.
LENGTHS, COMPARED = 8, 33
# Its error may be so many times what is allowed to ours: more of it is in narrow dtypes.
RELEASED_ERROR = 10
# The error that the parallel inverse may have on top; the tolerance of its sweeps.
PARALLEL_ERROR, PARALLEL_TOL = 1e-3, 1e-4

Run = Callable[[], torch.Tensor]


class Code(NamedTuple):
    """start(problem) gives a function that solves it; the first call of that may take longer than the next ones.

    slack: error that is allowed on top. most: kernels a token that are allowed for a number of layers, None where
    tokens have no kernels of their own.
    """

    start: Callable[[Problem], Run]
    slack: float = 0.0
    most: Callable[[int], float] | None = lambda layers: math.inf


def plain(attention: str, steps: int | None = None) -> Code:
    """The decoder in plain PyTorch; steps: of each block, None for all."""

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
    """block_inverse of a problem by a backend; passes: of the network, of all blocks, by a parallel solver."""

    def __init__(self, problem: Problem, backend: str, options: dict):
        self.problem, self.backend, self.options, self.passes = problem, backend, options, 0

    def __call__(self) -> torch.Tensor:
        self.passes = 0
        return self.problem.solve(self.invert)

    def invert(self, block: Block, z: torch.Tensor) -> torch.Tensor:
        if "solver" not in self.options:
            return inverse(block, z, self.backend, **self.options)
        x, report = inverse(block, z, self.backend, **self.options, return_report=True)
        self.passes += report.passes
        return x


def ours(backend: str, weights: Weights, most: Callable[[int], float] | None, **options) -> Code:
    """block_inverse by a backend."""
    options = {**weights.options, **options}
    return Code(lambda problem: Ours(problem, backend, options), PARALLEL_ERROR if "solver" in options else 0.0, most)


def codes(weights: Weights) -> dict[str, Code]:
    """What is timed of a case, beside the released loop."""
    return {
        "ours, triton": ours("triton", weights, lambda layers: 5 * layers + 1),
        "ours, cuda": ours("cuda", weights, lambda layers: 0),
        "plain decoder, fused attention": plain("fused"),
        "plain decoder, products": plain("products"),
    }


def parallel_codes(weights: Weights, batch: int, grid: tuple[int, int], neighbours: Callable) -> dict[str, Code]:
    """The parallel inverses by every backend; the specification goes sample after sample: at batch 1 alone."""
    found = {}
    for backend in backends()["block_jacobi"]:
        for window in (32, 64) if backend != "reference" or batch == 1 else ():
            for name, near in (("Jacobi", ()), ("quasi-Newton", neighbours(grid, window))):
                solver = Solver("jacobi", window=window, tol=PARALLEL_TOL, neighbours=near)
                found[f"{name}, window {window}, {backend}"] = ours(backend, weights, None, solver=solver)
    return found


def difference(found: torch.Tensor, exact: torch.Tensor) -> float:
    """max |found - exact|, or an error where values are not finite."""
    if not torch.isfinite(found).all():
        raise AssertionError("the result is not finite")
    return (found.double() - exact.double()).abs().max().item()


class Timing:
    """One case in one kind of weights, solved in float32; Skip where the clock has no time for that."""

    def __init__(self, name: str, kind: str, problem: Problem, bench: Bench, ceilings: dict, clock, resident: bool):
        self.weights, self.problem, self.bench, self.clock = WEIGHTS[kind], problem, bench, clock
        self.work = problem.work(self.weights, resident)
        self.row = {
            "case": name,
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
        """Skip where two calls of that many seconds would take longer than what is left."""
        needed, left = 2 * max(seconds, self.row["floor_seconds"]), self.clock.left()
        if needed > left:
            raise Skip(f"it takes {needed:.1f} s at least, {max(0, left):.1f} s are left")

    def check(self, found: torch.Tensor, slack: float) -> float:
        """The error, if it is allowed."""
        error = difference(found, self.exact)
        if error > self.allowed + slack and self.weights.exact:
            raise AssertionError(f"error {error:.2e}, allowed is {self.allowed + slack:.2e}")
        return error

    def measure(self, code: Code, seconds: float) -> dict:
        """Times of a code that is right: the first call, and the median of the next ones in about `seconds`."""
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
                raise AssertionError(f"{launched:g} kernels a token of {layers} layers")
        run = None
        release(self.bench)
        seconds = min(seconds, self.clock.left())
        return {**self.timed(code.start, code.slack, seconds, before), "launches": launched}

    def timed(self, start: Callable[[Problem], Run], slack: float, seconds: float, before: int) -> dict:
        """Times and error of what start(problem) gives; before: bytes that were allocated without it."""
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
        """The released loop; where a call would take too long, steps at evenly spaced lengths of its cache."""
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
    seconds: float,
    resident: bool = False,
    released: bool = True,
) -> Iterator[dict]:
    """A row a code, in about `seconds`."""
    timing = Timing(name, kind, problem, bench, ceilings, clock, resident)
    share = seconds / (len(timed) + 2)
    runs = {code: functools.partial(timing.measure, function, share) for code, function in timed.items()}
    if released:
        runs["released loop"] = functools.partial(timing.released, peer, share) if peer else without_peer
    for code, run in runs.items():
        release(bench)
        result, found = attempt(run)
        yield {**timing.row, "code": code, **(found if result == "passed" else {result: found})}


def without_peer() -> None:
    """In place of the released loop."""
    raise Skip("it needs --peer DIR")


def cases(bench: Bench, ceilings: dict, peer, clock: Clock, reserved: float = 0) -> Iterator[dict]:
    """The rows of all cases that the clock leaves time for, up to what is reserved for others."""
    clock = Clock(clock.left() - reserved)
    chosen = [(case, kind) for case in (DRY_CASES if bench.dry else CASES) for kind in case.weights]
    for i, (case, kind) in enumerate(chosen):
        seconds, weights = clock.left() / (len(chosen) - i), WEIGHTS[kind]

        def rows(case=case, kind=kind, weights=weights, seconds=seconds):
            if clock.left() < LEAST:
                raise Skip("the time for sampling is spent")
            problem = case.problem(weights.dtype, bench.device)
            return time_problem(
                case.name, kind, problem, codes(weights), peer, bench, ceilings, clock, seconds, case.resident,
                case.released,
            )  # fmt: skip

        yield from guarded(rows, {"case": case.name, "weights": kind, "code": "all"})
        release(bench)


def guarded(rows: Callable[[], Iterator[dict]], row: dict) -> Iterator[dict]:
    """The rows, up to where making them ends in an error."""
    try:
        yield from rows()
    except Skip as reason:
        yield {**row, "skipped": str(reason)}
    except Exception as error:
        traceback.print_exc()
        yield {**row, "failed": f"{type(error).__name__}: {error}"[:500]}


def trained(checkpoint: str, bench: Bench, ceilings: dict, peer, clock: Clock) -> Iterator[dict]:
    """The same of a trained flow, and its parallel inverses: those of random weights would say nothing."""
    from starflow.inversion.request import neighbours

    from ..cpu.parallel import Case as Trained
    from ..cpu.parallel import load

    kind, batches = ("float32", (1, 2)) if bench.dry else ("bfloat16", (1, 256))
    weights = WEIGHTS[kind]
    name, flow = load(checkpoint, weights.dtype)
    flow = flow.to(bench.device)
    for i, batch in enumerate(batches):

        def rows(batch=batch, seconds=clock.left() / (len(batches) - i)):
            case = Trained(name, flow, batch)
            given = [Block(w, spec, {n: v for n, v in more.items() if v is not None}) for w, spec, more in case.blocks]
            timed = {**codes(weights), **parallel_codes(weights, batch, flow.config.grid, neighbours)}
            return time_problem(f"{name}, batch {batch}", kind, Problem(given, case.z), timed, peer, bench, ceilings,
                                clock, seconds)  # fmt: skip

        yield from guarded(rows, {"case": f"{name}, batch {batch}", "weights": kind, "code": "all"})
        release(bench)


def release(bench: Bench) -> None:
    """Give back the memory of what nobody holds."""
    if not bench.dry:
        gc.collect()
        torch.cuda.empty_cache()


def markdown(rows: list[dict]) -> str:
    """The rows as a table; a row without a time says why. The plain decoder of a case is the faster of its two."""
    lines = [
        "",
        "Sampling: floors as benchmarks/floor.py counts them, errors against float32 sequential, peak memory of a code",
        "beyond weights and noise; a call of a few tokens has compiled its kernels before the first one.",
        "",
        "| case | weights | code | s | us a token step | floor, us | of the floor | released / this | plain / this "
        "| error | peak MiB | kernels a token | first call, s | repeats, note |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    best: dict[tuple, float] = {}
    for r in rows:
        if "seconds" in r:
            key = r["case"], r["weights"], r["code"].split(",")[0]
            best[key] = min(best.get(key, math.inf), r["seconds"])
    for r in rows:
        where = f"| {r['case']} | {r['weights']} | {r['code']} "
        if "seconds" not in r:
            why = next(f"{how}: {r[how]}" for how in ("failed", "skipped") if how in r)
            lines.append(f"{where}| " + "| " * 10 + why.replace("|", "/").replace("\n", " ") + " |")
            continue
        us, floor = 1e6 * r["seconds"] / r["steps"], ""
        if r["floor_seconds"] is not None:
            floor = f"{1e6 * r['floor_seconds'] / r['steps']:.1f} | {r['floor_seconds'] / r['seconds']:.0%}"
        peers = (best.get((r["case"], r["weights"], peer)) for peer in ("released loop", "plain decoder"))
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
