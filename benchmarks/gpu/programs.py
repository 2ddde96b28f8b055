"""The two programs of benchmarks.gpu as lists of cases.

`smoke` launches every kernel once at a small size; `bench` times them. Rows of both have a "kind", which names their
table on the page.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ..peers.released import load_peer
from . import choice, outside, sampling, sampling_checks
from .bench import Bench
from .facts import facts, libraries
from .op_cases import CHECKED, DRY, MAKE, TIMED
from .op_checks import CHECKS, check
from .op_times import time_op
from .runner import Case, Clock, Rows, Skip
from .sampling_cases import CASES, DRY_CASES, checked

# Seconds that each program may take in all.
SECONDS = {"smoke": 120, "bench": 450}
# Seconds of a case of a dry run, whose machine may be busy.
DRY_SECONDS = 300
MACHINE = "machine"


def smoke(args: argparse.Namespace) -> list[Case]:
    """Return the cases of the first contact with a GPU: versions, a launch of every kernel, constants of the chip."""
    bench = Bench(args.dry)
    cases = [_case(bench, MACHINE, 30, lambda clock, rows: _machine(bench, args, ceilings=False))]
    cases += _compilation(bench, "smoke", args)
    for op in MAKE:
        run = functools.partial(_checks, op, bench, ["error contract"])
        cases.append(_case(bench, f"launch: {op}", 20, run, "check"))
    for name, block in checked(args.dry).items():
        run = functools.partial(_sampling_checks, name, block, bench, True)
        cases.append(_case(bench, f"launch: block_inverse, {name}", 20, run, "check"))
    run = lambda clock, rows: outside.constants(args.pack, args.dry)  # noqa: E731
    cases.append(_case(bench, "constants of the chip", 20, run, "constant"))
    for tool in ("", "racecheck", "memcheck"):
        name = f"driver of the CUDA kernels{', ' if tool else ''}{tool}"
        run = lambda clock, rows, tool=tool: outside.onchip_driver(args.pack, args.dry, tool)  # noqa: E731
        cases.append(_case(bench, name, 25 if tool else 10, run, "check"))
    return cases


def bench(args: argparse.Namespace) -> list[Case]:
    """Return the cases of the measurement: sampling first, then ops, the attention table, and all further checks."""
    bench = Bench(args.dry)
    cases = [_case(bench, MACHINE, 30, lambda clock, rows: _machine(bench, args, ceilings=True))]
    cases += _compilation(bench, "bench", args)
    for case in DRY_CASES if args.dry else CASES:
        for kind in case.weights:
            run = functools.partial(_sampling, case, kind, bench, args)
            cases.append(_case(bench, f"sampling: {case.name}, {kind}", case.seconds, run, "sampling"))
    for batch in ((1, 2) if args.dry else (1, 256)) if args.checkpoint else ():
        run = functools.partial(_trained, args, batch, bench)
        cases.append(_case(bench, f"sampling: {Path(args.checkpoint).name}, batch {batch}", 30, run, "sampling"))
    for op in MAKE:
        for shape in (DRY if args.dry else TIMED)[op]:
            run = functools.partial(_times, op, shape, bench, args)
            cases.append(_case(bench, f"op: {op} {shape}", 30 if args.compiled else 10, run, "time"))
    for shape in choice.DRY if args.dry else choice.SHAPES:
        run = functools.partial(_attention, shape, bench)
        cases.append(_case(bench, f"attention table: {shape}", 20, run, "attention"))
    for op in MAKE:
        cases.append(_case(bench, f"checks: {op}", 60, functools.partial(_checks, op, bench, list(CHECKS)), "check"))
    for name, block in checked(args.dry).items():
        run = functools.partial(_sampling_checks, name, block, bench, False)
        cases.append(_case(bench, f"checks: block_inverse, {name}", 40, run, "check"))
    return cases


PROGRAMS: dict[str, Callable[[argparse.Namespace], list[Case]]] = {"smoke": smoke, "bench": bench}


def _case(bench: Bench, name: str, seconds: float, run: Callable, kind: str = "") -> Case:
    """Return a case whose rows have a kind."""

    def tagged(clock: Clock, rows: Rows) -> Iterator[dict]:
        for row in run(clock, rows):
            yield {"kind": kind, **row} if kind else row

    return Case(name, DRY_SECONDS if bench.dry else seconds, tagged)


def _ceilings(rows: Rows) -> dict[str, float]:
    """Return the ceilings that the first case measured."""
    for row in rows.cases().get(MACHINE, ()):
        if "ceilings" in row:
            return row["ceilings"]
    raise Skip("the ceilings of the device were not measured")


def _machine(bench: Bench, args: argparse.Namespace, ceilings: bool) -> Iterator[dict]:
    yield {"machine": facts(bench, args.pack)}
    yield from libraries()
    if ceilings:
        yield {"ceilings": bench.ceilings()}


def _compilation(bench: Bench, program: str, args: argparse.Namespace) -> list[Case]:
    """Return the case that compiles what the others need, unless they run in the interpreter."""

    def run(clock: Clock, rows: Rows) -> Iterator[dict]:
        from .ahead import compile_all

        # What cannot be compiled is told by the case that needs it.
        with ThreadPoolExecutor() as pool, contextlib.suppress(Skip, RuntimeError):
            programs = [pool.submit(outside.program, name, args.pack) for name in outside.PROGRAMS]
            yield compile_all(program, args.checkpoint)
            for compiled in programs:
                compiled.result()

    return [] if bench.dry else [_case(bench, "kernels compiled ahead", 60, run)]


def _checks(op: str, bench: Bench, names: list[str], clock: Clock, rows: Rows) -> Iterator[dict]:
    # For a first contact, one small shape is enough.
    shapes = (DRY if bench.dry else CHECKED)[op]
    for shape in shapes if len(names) > 1 else shapes[:1]:
        for dtype in bench.dtypes:
            yield from check(op, shape, dtype, bench, names)


def _sampling_checks(name: str, block, bench: Bench, brief: bool, clock: Clock, rows: Rows) -> Iterator[dict]:
    yield from sampling_checks.checks(name, block, bench, brief)


def _sampling(case, kind: str, bench: Bench, args: argparse.Namespace, clock: Clock, rows: Rows) -> Iterator[dict]:
    yield from sampling.time_case(case, kind, bench, _ceilings(rows), _peer(args), clock)


def _trained(args: argparse.Namespace, batch: int, bench: Bench, clock: Clock, rows: Rows) -> Iterator[dict]:
    yield from sampling.trained(args.checkpoint, batch, bench, _ceilings(rows), _peer(args), clock)


def _peer(args: argparse.Namespace):
    return load_peer(args.peer) if args.peer else None


def _times(op: str, shape: tuple, bench: Bench, args: argparse.Namespace, clock: Clock, rows: Rows) -> Iterator[dict]:
    yield from time_op(op, shape, bench, _ceilings(rows), args.compiled)


def _attention(shape: tuple, bench: Bench, clock: Clock, rows: Rows) -> Iterator[dict]:
    with choice.deterministic():
        for dtype in (torch.float32,) if bench.dry else (torch.bfloat16, torch.float16):
            yield from choice.measure(shape, dtype, bench.device, bench.seconds)
