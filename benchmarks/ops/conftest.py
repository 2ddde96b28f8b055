"""Shared fixtures of the benchmarks: check first, then time, beside the floor."""

from __future__ import annotations

import pytest
import torch

from ..machine import copy_bandwidth, description, peak_flops


@pytest.fixture(scope="session", autouse=True)
def quiet_peak():
    """Measure the peak before the compiler processes of torch.compile start."""
    peak_flops()


@pytest.fixture
def timed(benchmark):
    """Return timed(run, exact, plain, bytes, flops, own), which checks run() against float64 and then times it.

    `exact` and `plain` are the outputs in float64, and by torch in the dtype of run(). `bytes` and `flops` are what the
    op has to move and compute. The floor is the larger of bytes / copy bandwidth at that working set and flops / peak.
    `own` says that run() is ours, so that the error contract holds; otherwise its error is recorded.
    """

    def time(run, exact, plain, bytes: int, flops: int = 0, own: bool = True) -> None:
        worst = 0.0
        for found, right, usual in zip(run(), exact, plain, strict=True):
            assert torch.isfinite(found).all()
            error, allowed = ((value.double() - right).abs().max().item() for value in (found, usual))
            bound = 2 * (allowed + torch.finfo(found.dtype).eps * right.abs().max().item())
            worst = max(worst, error / bound)
        assert worst <= 1 or not own
        benchmark.extra_info["error_of_contract"] = worst
        benchmark(run)
        floor = max(bytes / copy_bandwidth(bytes), flops / peak_flops() if flops else 0)
        benchmark.extra_info["floor_microseconds"] = 1e6 * floor
        if benchmark.stats:
            benchmark.extra_info["of_floor"] = floor / benchmark.stats.stats.median

    return time


def pytest_benchmark_update_machine_info(config, machine_info):
    """Write threads, instruction set and versions into saved results."""
    machine_info.update(description())
