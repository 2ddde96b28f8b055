"""Parallel inverses of trained flows: published rules beside ours, same weights, same noise, one process.

    python -m benchmarks.cpu.parallel CHECKPOINT ... --peer DIR --json benchmarks/results/parallel_cpu.json
    python -m benchmarks.cpu.parallel CHECKPOINT ... --samples 1000 --json benchmarks/results/parallel_samples_cpu.json

A checkpoint is a folder or the name of a bundled one. `DIR` holds transformer_flow.py of github.com/apple/ml-tarflow.
The released loop is left out without it, and where a flow has another shape. Every method inverts all blocks. Its
error is max |x - x of our sequential kernel|, its certificate max |forward(x) - z|. Steps / passes (token steps of
the sequential loop over passes of the method) is the speed-up on a device where many tokens take as long as one.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from starflow import Flow, Guidance
from starflow.inversion.request import Inversion, neighbours
from starflow.models.certificate import certificate
from starflow.seeds import generator
from starflow_kernels import Solver, block_inverse

from ..command import benchmark
from ..peers.published import STARFLOW, EagerBlock, Rule, gs_jacobi_rules, sejd_rules, solve
from ..peers.released import load_peer, released_model, timed

WINDOWS = (16, 32, 64)
ERROR = 1e-4


class Work(NamedTuple):
    """Result of a method on a block; tokens count over all samples."""

    x: torch.Tensor
    passes: int
    tokens: int


Method = Callable[[int, torch.Tensor], Work]


class Case:
    """A flow, noise of the prior as tokens, and the conditions of its blocks; labels take turns."""

    def __init__(self, name: str, flow: Flow, batch: int, seed: int = 0, z: torch.Tensor | None = None):
        self.name, self.flow, self.batch = name, flow, batch
        self.images = flow.noise(batch, generator(seed)) if z is None else z
        self.z = flow.tokens(self.images)
        classes = flow.config.num_classes
        self.labels = torch.arange(batch, device=self.z.device) % classes if classes else None
        grid, contexts = flow.grid(self.images), flow.contexts(self.labels, None, self.z)
        self.blocks = [
            (block.weights(), block.spec, block.context(*context, flow.rotary(i, grid, self.z), {}))
            for i, (block, (context, _)) in enumerate(zip(flow.blocks, contexts))
        ]

    def eager(self, i: int) -> EagerBlock:
        """Return a block for the published rules."""
        weights, spec, context = self.blocks[i]
        return EagerBlock(weights, spec, *self.z.shape[:2], **{k: v for k, v in context.items() if k != "prefix"})

    def run(self, method: Method) -> list[tuple[Work, float]]:
        """Return work and seconds by block; each block inverts the output of the block before."""
        found, x = [], self.z
        for i in reversed(range(len(self.blocks))):
            work, seconds = timed(lambda i=i, x=x: method(i, x))
            found.append((work, seconds))
            x = work.x
        return found[::-1]

    def certificate(self, x: torch.Tensor) -> float:
        """Return max |forward(x) - z|."""
        return certificate(self.flow, self.flow.images(x), self.images, self.labels).max


def own(case: Case, solvers: Solver | list[Solver]) -> Method:
    """Return our op as a method, with one solver for all blocks or one per block."""

    def run(i: int, z: torch.Tensor) -> Work:
        weights, spec, context = case.blocks[i]
        solver = solvers if isinstance(solvers, Solver) else solvers[i]
        found = block_inverse(z, weights, spec, **context, solver=solver)
        x, report = found.x, found.report
        return Work(x, report.passes, report.tokens)

    return run


def published(case: Case, rules: list[Rule]) -> Method:
    """Return a published method, with one rule per block."""

    def run(i: int, z: torch.Tensor) -> Work:
        block = case.eager(i)
        return Work(solve(block, z, rules[i]), block.passes, block.tokens)

    return run


def released(case: Case, model) -> Method:
    """Return the released loop as a method."""
    steps = case.z.shape[1] - 1

    @torch.no_grad()
    def run(i: int, z: torch.Tensor) -> Work:
        return Work(model.blocks[i].reverse(z.clone(), case.labels), steps, case.batch * steps)

    return run


def inputs_and_results(case: Case) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return noise and data of every block by our sequential kernel."""
    x = [work.x for work, _ in case.run(own(case, Solver()))]
    return [*x[1:], case.z], x


def own_methods(case: Case, tol: float) -> dict[str, Method]:
    """Return our methods: sequential, and both iterations over all tokens, sliding windows and fixed modules."""
    methods = {"sequential": own(case, Solver())}
    for name in ("Jacobi", "quasi-Newton"):
        shapes = {"": (0, True), ", modules of 32": (32, False)}
        shapes |= {f", window {window}": (window, True) for window in WINDOWS}
        for suffix, (window, slide) in shapes.items():
            if window < case.z.shape[1]:
                near = () if name == "Jacobi" else neighbours(case.flow.config.grid, window)
                solver = Solver("jacobi", window=window, slide=slide, tol=tol, neighbours=near)
                methods[name + suffix] = own(case, solver)
    if case.flow.calibration:
        methods["auto"] = own(case, Inversion(tol=tol).solvers(case.flow, case.images, Guidance()))
    return methods


def published_methods(case: Case, model) -> dict[str, Method]:
    """Return the released loop and the published rules."""
    count = len(case.blocks)
    noise, data = inputs_and_results(case)
    methods = {} if model is None else {"released loop": released(case, model)}
    for rest in (10, 20):
        rules = gs_jacobi_rules([case.eager(i) for i in range(count)], noise, data, rest)
        methods[f"GS-Jacobi [{'/'.join(str(i) for i in range(count) if rules[i].modules > 1)}-8-32-{rest}]"] = (
            published(case, rules)
        )
    methods["SeJD"] = published(case, sejd_rules(count))
    methods["STARFlow rule"] = published(case, [STARFLOW] * count)
    return methods


def finite(value: float) -> float | None:
    """Replace a value that JSON does not have by None."""
    return value if math.isfinite(value) else None


def largest(difference: torch.Tensor) -> float | None:
    """Return max |difference|, or None where it is not finite."""
    return finite(difference.abs().max().item())


def measure(case: Case, methods: dict[str, Method], repeats: int, budget: float) -> list[dict]:
    """Return the rows of the table. Methods run in turns, `repeats` times or for about `budget` seconds."""
    _, exact = inputs_and_results(case)
    runs: dict[str, list[list[tuple[Work, float]]]] = {name: [] for name in methods}
    end = time.perf_counter() + budget
    for turn in range(repeats):
        for name, method in methods.items():
            runs[name].append(case.run(method))
        if turn and time.perf_counter() > end:
            break
    rows, steps = [], sum(work.passes for work, _ in runs["sequential"][0])
    for name, found in runs.items():
        works = [work for work, _ in found[0]]
        errors = [largest(work.x - x) for work, x in zip(works, exact)]
        passes = [work.passes for work in works]
        rows.append(
            {
                "case": case.name,
                "batch": case.batch,
                "method": name,
                "passes": passes,
                "tokens": [work.tokens / case.z[..., 0].numel() for work in works],
                "seconds": statistics.median(sum(s for _, s in run) for run in found),
                "block_seconds": [statistics.median(run[i][1] for run in found) for i in range(len(passes))],
                "repeats": len(found),
                "error": errors[0],
                "block_errors": errors,
                "certificate": finite(case.certificate(works[0].x)),
                "steps_a_pass": steps / sum(passes),
            }
        )
    seconds = {row["method"]: row["seconds"] for row in rows}
    for row in rows:
        row["speedup"] = seconds["sequential"] / row["seconds"]
        if "released loop" in seconds:
            row["speedup_over_released"] = seconds["released loop"] / row["seconds"]
    return rows


def check_samples(name: str, flow: Flow, count: int, tol: float, wanted: Callable) -> list[dict]:
    """Return the worst of `count` samples, in batches, by each of our methods that is wanted."""
    errors: dict[str, list[torch.Tensor]] = {}
    residuals: dict[str, float] = {}
    passes: dict[str, int] = {}
    for z in flow.noise(count, generator(0)).split(50):
        case = Case(name, flow, len(z), z=z)
        exact = inputs_and_results(case)[1][0]
        for method, run in own_methods(case, tol).items():
            if wanted(method):
                works = [work for work, _ in case.run(run)]
                errors.setdefault(method, []).append((works[0].x - exact).abs().amax((1, 2)))
                residuals[method] = max(residuals.get(method, 0.0), case.certificate(works[0].x))
                passes[method] = max(passes.get(method, 0), sum(work.passes for work in works))
    rows = []
    for method, parts in errors.items():
        error = torch.cat(parts)
        rows.append(
            {
                "case": name,
                "method": method,
                "tol": tol,
                "samples": len(error),
                "worst_sample": int(error.argmax()),
                "error": largest(error),
                "median_error": error.median().item(),
                "above": int((error > ERROR).sum()),
                "certificate": finite(residuals[method]),
                "most_passes": passes[method],
            }
        )
    return rows


def number(value: float | None) -> str:
    """Format a small number for a table."""
    return "not finite" if value is None else f"{value:.1e}"


def markdown(rows: list[dict]) -> str:
    """Format the rows as one table per case, with blocks in the order in which they are sampled."""
    lines = []
    for key in dict.fromkeys((row["case"], row["batch"]) for row in rows):
        lines += [
            f"\n{key[0]}, batch {key[1]}:\n",
            "| method | passes, block after block | tokens evaluated / T | seconds | faster than sequential "
            "| than the released loop | max error | certificate | steps / passes |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            if (row["case"], row["batch"]) == key:
                over = f"{row['speedup_over_released']:.2f}x" if "speedup_over_released" in row else "not run"
                passes = f"{' / '.join(map(str, reversed(row['passes'])))} = {sum(row['passes'])}"
                lines.append(
                    f"| {row['method']} | {passes} | {sum(row['tokens']):.1f} | {row['seconds']:.3f} "
                    f"| {row['speedup']:.2f}x | {over} | {number(row['error'])} | {number(row['certificate'])} "
                    f"| {row['steps_a_pass']:.1f} |"
                )
    return "\n".join(lines)


def markdown_samples(rows: list[dict]) -> str:
    """Format the rows of `check_samples` as a table."""
    lines = [
        f"| model | method | tol | samples | worst error | median | samples above {ERROR:.0e} | worst certificate |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['case']} | {row['method']} | {row['tol']:.0e} | {row['samples']} | {number(row['error'])} "
            f"| {number(row['median_error'])} | {row['above']} | {number(row['certificate'])} |"
        )
    return "\n".join(lines)


def load(checkpoint: str, dtype: torch.dtype = torch.float32) -> tuple[str, Flow]:
    """Return name and flow of a checkpoint."""
    return Path(checkpoint).name, Flow.from_pretrained(checkpoint, dtype=dtype).requires_grad_(False)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoints", nargs="+", help="folders, or names of bundled checkpoints")
    parser.add_argument("--peer", type=Path, help="folder with the released transformer_flow.py")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--methods", default="", help="only methods in whose name this pattern is found")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), nargs="+", default=["float32"], help="of the weights"
    )
    parser.add_argument("--tol", type=float, default=Solver.tol, help="tolerance of ours")
    parser.add_argument("--samples", type=int, default=0, help="only compare so many samples with the sequential ones")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--budget", type=float, default=120, help="seconds of a case after which its repeats end")


def results(args: argparse.Namespace) -> dict:
    peer, rows = load_peer(args.peer) if args.peer else None, []

    def wanted(method: str) -> bool:
        return method == "sequential" or re.search(args.methods, method) is not None

    for checkpoint, dtype in itertools.product(args.checkpoints, args.dtype):
        name, flow = load(checkpoint, getattr(torch, dtype))
        name = f"{name}, {dtype} weights"
        if args.samples:
            rows += check_samples(name, flow, args.samples, args.tol, wanted)
            continue
        model = released_model(peer, flow) if peer and dtype == "float32" else None
        for batch in args.batch:
            case = Case(name, flow, batch)
            methods = {**published_methods(case, model), **own_methods(case, args.tol)}
            methods = {method: run for method, run in methods.items() if wanted(method)}
            rows += measure(case, methods, args.repeats, args.budget)
            print(markdown(rows[-len(methods) :]), flush=True)
    if args.samples:
        print(markdown_samples(rows))
    return {"rows": rows}


main = benchmark(__doc__, results, options)


if __name__ == "__main__":
    main()
