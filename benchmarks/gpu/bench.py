"""Device, timers and counters of the GPU benchmarks, and the outcome of a check."""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterator

import torch

from starflow_kernels._triton import runtime

from .runner import Skip

GIB = 2**30


class Bench:
    """Device on which everything runs: a GPU, or in a dry run the CPU.

    Args:
        dry: use tiny shapes on the CPU.
    """

    def __init__(self, dry: bool):
        self.dry, self.device = dry, "cpu" if dry else "cuda"
        self.dtypes = [torch.float32, torch.float16] if dry else [torch.float32, torch.bfloat16, torch.float16]
        self.timed_dtype = torch.float32 if dry else torch.bfloat16
        self.compiler = "aot_eager" if dry else "inductor"

    def seconds(self, run: Callable) -> float:
        """Return the median seconds of run() with cold caches."""
        if self.dry:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        run()
        torch.cuda.synchronize()
        cold, times = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda"), []
        for _ in range(30):
            cold.zero_()  # evicts what the last call left in cache
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            times.append((start, end))
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in times) / 1e3

    def peak_memory(self, run: Callable) -> int | None:
        """Return the peak bytes that run() allocates, None in a dry run."""
        if self.dry:
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def ceilings(self) -> dict[str, float]:
        """Measure the bytes per second of a copy and the operations per second of matrix products."""
        size, n = (2**16, 64) if self.dry else (GIB, 8192)
        source = torch.ones(size, dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=self.device) for _ in range(2))
        c, d = a.float(), b.float()
        return {
            "bytes_a_second": 2 * size / self.seconds(lambda: target.copy_(source)),
            "operations_a_second": 2 * n**3 / self.seconds(lambda: a @ b),
            "float32_operations_a_second": 2 * n**3 / self.seconds(lambda: c @ d),
        }

    def wall(self, run: Callable) -> tuple[object, float]:
        """Return the result of run() and its seconds, until the device is idle."""
        self.wait()
        start = time.perf_counter()
        result = run()
        self.wait()
        return result, time.perf_counter() - start

    def wait(self) -> None:
        """Wait until the device is idle."""
        if not self.dry:
            torch.cuda.synchronize()

    def allocated(self) -> int:
        """Return the bytes of tensors on the GPU."""
        self.wait()
        return 0 if self.dry else torch.cuda.memory_allocated()

    def launched(self, run: Callable) -> int:
        """Count the kernels that run() launches, also by graphs; in a dry run only those of Triton."""
        if not self.dry:
            from torch.profiler import ProfilerActivity, profile

            with profile(activities=[ProfilerActivity.CUDA]) as trace:
                run()
                torch.cuda.synchronize()
            return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in trace.events())
        if runtime.unavailable():
            run()
            return 0
        # Private to Triton; seen in 3.6.0 and 3.9.0.
        from triton.runtime.interpreter import GridExecutor

        launch, count = GridExecutor.__call__, itertools.count()

        def counted(*args, **options):
            next(count)
            return launch(*args, **options)

        GridExecutor.__call__ = counted
        try:
            run()
        finally:
            GridExecutor.__call__ = launch
        return next(count)

    @contextlib.contextmanager
    def poisoned(self) -> Iterator[None]:
        """Fill memory that torch will allocate with NaN; on a GPU the blocks that its allocator keeps."""
        if self.dry:
            torch.use_deterministic_algorithms(True)
        else:
            sizes = [2**28] * 2 + [2**18] * 64 + [64] * 512
            held = [torch.full((size,), math.nan, device=self.device) for size in sizes]
            del held
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)

    @contextlib.contextmanager
    def products_by_rows(self) -> Iterator[None]:
        """Multiply row by row in the interpreter: the bits of numpy's products depend on the place of a row."""
        if not self.dry:
            yield
            return
        import numpy as np

        usual = np.matmul
        np.matmul = lambda a, b, dtype=None: (a[:, :, None] * b[None]).sum(1, dtype=dtype)
        try:
            yield
        finally:
            np.matmul = usual


@contextlib.contextmanager
def refusals_skipped() -> Iterator[None]:
    """Turn the error of a backend that cannot run its arguments into Skip with the reason."""
    try:
        yield
    except ValueError as error:
        if "cannot run" in str(error):
            raise Skip(str(error).split(": ", 1)[1]) from error
        raise


def attempt(function: Callable, *args) -> tuple[str, str]:
    """Call a function; return "passed", "skipped" or "failed", and its result or the reason."""
    try:
        return "passed", function(*args) or ""
    except Skip as reason:
        return "skipped", str(reason)
    except Exception as error:
        traceback.print_exc()
        return "failed", f"{type(error).__name__}: {error}"[:500]
