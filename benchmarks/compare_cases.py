"""The cases that two commits are compared by, timed or counted in one process.

    python -m benchmarks.compare_cases CASE ... --threads 2

This runs in a checkout of either commit, so cases stand on the public functions alone.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

import starflow_kernels
from starflow import Flow
from starflow_kernels import AffineSpec, affine_flow, block_forward, block_inverse, linear

from .machine import compile_c
from .ops.bench_block import SHAPES, random_weights
from .training_step import CONFIG, own_loss, trainer

Run = Callable[[], object]
COUNTER = """
#include <valgrind/callgrind.h>
void begin(void) { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }
void end(void) { CALLGRIND_STOP_INSTRUMENTATION; CALLGRIND_DUMP_STATS; }
"""
WARM = 3


def _block(call: Callable, shape: str, batch: int) -> Run:
    T, spec = SHAPES[shape]
    weights, x = random_weights(spec), torch.randn(batch, T, spec.token_dim)
    return lambda: call(x, weights, spec)


def _flow(direction: str, batch: int) -> Run:
    flow = Flow.from_pretrained("digits").requires_grad_(False)
    labels, z = torch.arange(batch) % 10, flow.noise(batch)
    if direction == "inverse":
        return lambda: flow.inverse(z, labels)
    return lambda: flow.log_prob(z.clamp(-1, 1), labels)


def _training_step() -> Run:
    return trainer(Flow(CONFIG), own_loss, torch.randn(4, 3, 32, 32))


def _linear(outputs: int, inputs: int) -> Run:
    x, weight, bias = torch.randn(1, 512, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    return lambda: linear(x, weight, bias)


def _affine_flow() -> Run:
    x, params = torch.randn(64, 256, 12), torch.randn(64, 256, 24)
    return lambda: affine_flow(x, params, AffineSpec())


CASES: dict[str, Callable[[], Run]] = {
    "flow of digits, inverse, batch 1": lambda: _flow("inverse", 1),
    "flow of digits, inverse, batch 100": lambda: _flow("inverse", 100),
    "flow of digits, density, batch 100": lambda: _flow("density", 100),
    **{
        f"{shape} block, {name}, batch {batch}": functools.partial(_block, call, shape, batch)
        for shape, (name, call), batch in itertools.product(
            SHAPES, (("inverse", block_inverse), ("density", block_forward)), (1, 16)
        )
    },
    "training step of 32x32, batch 4": _training_step,
    "linear, 512 tokens, 128 to 512": lambda: _linear(512, 128),
    "affine_flow, (64, 256, 12)": _affine_flow,
}


def timed(runs: Iterable[tuple[str, Run]], seconds: float) -> dict[str, float]:
    """Return the median seconds of a call of each case, over calls within `seconds`."""
    found = {}
    for name, run in runs:
        for _ in range(WARM):
            run()
        times, end = [], time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        found[name] = statistics.median(times)
    return found


def count(runs: Iterable[tuple[str, Run]]) -> None:
    """Have callgrind, which this process runs under, write the instructions of one call of each case to a file."""
    counter = compile_c(COUNTER)
    gc.disable()
    for _, run in runs:
        for _ in range(WARM):
            run()
        counter.begin()
        run()
        counter.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", choices=CASES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.3, help="duration of a case")
    parser.add_argument("--count", action="store_true", help="count instructions under callgrind instead")
    args = parser.parse_args()
    package = Path(starflow_kernels.__file__)
    if not package.is_relative_to(Path.cwd()):
        sys.exit(f"{package} is not the package of {Path.cwd()}")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    # One case after the other, so that none finds the caches of another.
    runs = ((name, CASES[name]()) for name in args.cases)
    found = count(runs) if args.count else timed(runs, args.seconds)
    print(json.dumps({"seconds": found, "instruction_set": torch.ops.starflow_native.instruction_set()}))


if __name__ == "__main__":
    main()
