"""Measured ceilings of this machine's CPU: read bandwidth by working set, and float32 multiply-adds."""

from __future__ import annotations

import ctypes
import datetime
import functools
import mmap
import platform
import re
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
SOURCE = r"""
typedef float V __attribute__((vector_size(64)));
float read_all(const V *p, long n, long rounds) {
    V a = {0}, b = {0}, c = {0}, d = {0};
    for (long r = 0; r < rounds; ++r) {
        for (long i = 0; i < n; i += 4) { a += p[i]; b += p[i + 1]; c += p[i + 2]; d += p[i + 3]; }
        __asm__ volatile("" ::: "memory");
    }
    V s = a + b + c + d;
    return s[0];
}
float multiply_add(long rounds) {
    V x[16];
    for (int i = 0; i < 16; ++i) x[i] = (V){0} + (float)i;
    V m = (V){0} + 0.999f, c = (V){0} + 0.001f;
    for (long r = 0; r < rounds; ++r)
        for (int i = 0; i < 16; ++i) x[i] = x[i] * m + c;
    V s = {0};
    for (int i = 0; i < 16; ++i) s += x[i];
    return s[0];
}
"""
FLOPS_PER_ROUND = 16 * 16 * 2


def compile_c(source: str) -> ctypes.CDLL:
    """Return a library compiled for this processor."""
    folder = Path(tempfile.mkdtemp())
    (folder / "library.c").write_text(source)
    # Not -ffast-math: a library that is linked with it flushes denormal numbers to zero in the whole process.
    command = ["cc", "-O3", "-march=native", "-funroll-loops", "-shared", "-fPIC", "-Wno-psabi"]
    subprocess.run([*command, "library.c", "-o", "library.so"], cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "library.so"))


@functools.cache
def _library() -> ctypes.CDLL:
    library = compile_c(SOURCE)
    library.read_all.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_long]
    library.multiply_add.argtypes = [ctypes.c_long]
    return library


def _seconds(calls: list, repeats: int) -> float:
    """Return the shortest time in which all calls end, one thread per call."""
    best = float("inf")
    for _ in range(repeats):
        threads = [threading.Thread(target=call) for call in calls]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        best = min(best, time.perf_counter() - start)
    return best


def _huge_pages(floats: int) -> torch.Tensor:
    """Return float32 ones in huge pages, which stream faster, where the system has them."""
    memory = mmap.mmap(-1, 4 * floats)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32).fill_(1)


def read_bandwidth(total_bytes: int, repeats: int = 5) -> float:
    """Return bytes per second read by torch's number of threads, each from its share of `total_bytes`."""
    threads, library = torch.get_num_threads(), _library()
    vectors = max(4, total_bytes // threads // 64 // 4 * 4)
    buffers = [_huge_pages(vectors * 16) for _ in range(threads)]
    rounds = max(1, 2**28 // (vectors * 64))
    calls = [functools.partial(library.read_all, buffer.data_ptr(), vectors, rounds) for buffer in buffers]
    return threads * vectors * 64 * rounds / _seconds(calls, repeats)


def copy_bandwidth(total_bytes: int, repeats: int = 20) -> float:
    """Return bytes per second, read and written, of torch's copy between two buffers of half of `total_bytes`."""
    source = torch.ones(max(1, total_bytes // 8))
    target = torch.empty_like(source)
    target.copy_(source)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 8 * source.numel() / best


def peak_flops() -> float:
    """Return float32 operations per second of fused multiply-adds on torch's number of threads, measured once."""
    return _peak_flops(torch.get_num_threads())


@functools.cache
def _peak_flops(threads: int) -> float:
    rounds = 2_000_000
    calls = [functools.partial(_library().multiply_add, rounds)] * threads
    return threads * rounds * FLOPS_PER_ROUND / _seconds(calls, repeats=25)


def description() -> dict[str, str | int | float]:
    """Return CPU, its ceilings on torch's number of threads, versions, commit and date, for the head of a result."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    cpu = "{model name}, family {cpu family}, model {model}".format_map(fields) if "cpu family" in fields else ""
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, cwd=HERE).stdout.strip() if shutil.which("git") else ""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit or "unknown",
        "cpu": cpu or platform.processor(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "float32_gflops": round(peak_flops() / 1e9, 1),
        "read_gb_per_second": round(read_bandwidth(2**28) / 1e9, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    print(description())
    print(f"multiply-add {peak_flops() / 1e9:.0f} GFLOP/s")
    for size in (2**18, 2**20, 2**22, 2**24, 2**26, 2**28):
        read, copy = read_bandwidth(size) / 1e9, copy_bandwidth(size) / 1e9
        print(f"{size / 2**20:8.2f} MiB: read {read:6.1f}, copy {copy:6.1f} GB/s")


def reset_peak() -> int:
    """Return the memory of this process in bytes, which `peak_bytes` then starts from."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def peak_bytes() -> int:
    """Return the largest memory of this process since `reset_peak`."""
    return _memory("VmHWM")


def _memory(name: str) -> int:
    # getrusage would also count what the parent had used before it started this process.
    (kilobytes,) = re.findall(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(kilobytes)
