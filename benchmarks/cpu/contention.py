"""Sampling while other processes use the cores: times of a token step beside those of one thread under the same load.

    python -m benchmarks.cpu.contention --json benchmarks/results/contention_cpu.json

Each busy process runs an endless loop. Calls with different numbers of threads take turns, and each outputs the same
bits. No op of torch runs between calls, since its threads spin for milliseconds afterwards unless OMP_WAIT_POLICY is
"passive". A row has the median and the mean time of a token step, and the ratio of both to those of one thread. The
last rows are those of a process that may use one core only.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import torch

from starflow import Flow
from starflow.models.config import FlowConfig

from ..command import benchmark

THREADS = (1, 2, 4)


@dataclasses.dataclass(frozen=True)
class Case:
    """A flow on square images of `size` pixels and a batch size."""

    name: str
    size: int
    batch: int

    def flow(self) -> Flow:
        """Return a flow with random weights."""
        torch.manual_seed(0)
        shape = {"image_channels": 1, "image_size": 8, "channels": 64, "layers": (2,) * 4}
        if self.size == 32:
            shape = {"image_channels": 3, "image_size": 32, "channels": 128, "layers": (4,)}
        flow = Flow(FlowConfig(patch_size=2, **shape)).eval()
        for name, weight in flow.named_parameters():
            if "proj_out.weight" in name:
                torch.nn.init.normal_(weight, std=0.02)
        return flow


CASES = [Case(f"8x8 images, 4 x 2 layers, batch {batch}", 8, batch) for batch in (1, 1000)]
CASES += [Case(f"32x32 images, 1 x 4 layers, batch {batch}", 32, batch) for batch in (1, 16)]


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Run `count` processes that compute without end."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@torch.no_grad()
def measure(case: Case, busy: int, seconds: float, rounds: int) -> list[dict]:
    """Return a row per number of threads, each from `rounds` turns of `seconds`."""
    flow = case.flow()
    z = flow.noise(case.batch)
    times: dict[int, list[float]] = {threads: [] for threads in THREADS}
    expected = flow.inverse(z).x.numpy()
    with busy_processes(busy):
        for _ in range(rounds):
            for threads in THREADS:
                torch.set_num_threads(threads)
                end = time.perf_counter() + seconds
                while (start := time.perf_counter()) < end:
                    x = flow.inverse(z).x
                    times[threads].append(time.perf_counter() - start)
                    assert np.array_equal(x.numpy(), expected)
    rows, columns = flow.config.grid
    steps = len(flow.config.layers) * (rows * columns - 1)
    median, mean = (
        {n: average(t) / steps for n, t in times.items()} for average in (statistics.median, statistics.mean)
    )
    return [
        {
            "case": case.name,
            "busy_processes": busy,
            "cores": len(os.sched_getaffinity(0)),
            "threads": threads,
            "microseconds": {"median": 1e6 * median[threads], "mean": 1e6 * mean[threads]},
            "to_one_thread": {"median": median[threads] / median[1], "mean": mean[threads] / mean[1]},
        }
        for threads in THREADS
    ]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2, 4], help="numbers of busy processes")
    parser.add_argument("--seconds", type=float, default=0.2, help="duration of a turn")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each number of threads")


def results(args: argparse.Namespace) -> dict:
    cores, rows = os.sched_getaffinity(0), []
    for available in (cores, set(sorted(cores)[:1])):
        os.sched_setaffinity(0, available)
        for case in CASES:
            for busy in args.busy if available == cores else (0,):
                rows += measure(case, busy, args.seconds, args.rounds)
                print(rows[-2], flush=True)
    os.sched_setaffinity(0, cores)
    return {"rows": rows}


main = benchmark(__doc__, results, options)


if __name__ == "__main__":
    main()
