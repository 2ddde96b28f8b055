"""The programs without torch: constants of the chip, and the driver of the on-chip kernel for compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from .runner import Skip

HERE = Path(__file__).parent
PROGRAMS = ("constants", "onchip_driver")
OPTIONS = ("-std=c++17", "-O2", "-fmad=false", "-cudart=static", "-lineinfo")


def tool(name: str) -> str | None:
    """Return the path of a program of CUDA, which may not be on the PATH."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name) or shutil.which(name, path=f"{home}/bin")


def build(name: str, folder: Path, chip: str = "native") -> Path:
    """Compile a program for a chip, such as "sm_90a", into a folder; raise Skip without nvcc."""
    nvcc = tool("nvcc")
    if not nvcc:
        raise Skip("it needs nvcc, or a folder of benchmarks.gpu.pack")
    folder.mkdir(parents=True, exist_ok=True)
    # A program that a later run finds must be complete.
    part = folder / f"{name}.part"
    command = [nvcc, *OPTIONS, f"-arch={chip}", str(HERE / f"{name}.cu"), "-o", str(part)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-400:])
    return part.replace(folder / name)


def program(name: str, pack: Path, dry: bool = False) -> Path:
    """Return a program of the pack, which is compiled if it is not there."""
    if dry:
        raise Skip("it needs a GPU")
    return pack / name if (pack / name).exists() else build(name, pack)


def constants(pack: Path, dry: bool) -> Iterator[dict]:
    """Yield a row per constant of the chip."""
    done = subprocess.run([program("constants", pack, dry)], capture_output=True, text=True)
    for line in done.stdout.splitlines():
        name, value, unit = line.rsplit(", ", 2)
        yield {"constant": name, "value": float(value), "unit": unit}
    if done.returncode:
        raise RuntimeError(done.stderr.strip())


def onchip_driver(pack: Path, dry: bool, sanitizer: str) -> Iterator[dict]:
    """Run the driver, by itself or under a tool of compute-sanitizer; yield a row with what it says.

    Args:
        pack: folder of benchmarks.gpu.pack.
        dry: refuse, as there is no GPU.
        sanitizer: "memcheck", "racecheck" or "" for none.
    """
    command = [str(program("onchip_driver", pack, dry))]
    if sanitizer:
        found = tool("compute-sanitizer")
        if not found:
            raise Skip("compute-sanitizer is not installed")
        command = [found, "--tool", sanitizer, "--error-exitcode", "1", *command]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    # A machine that gives no access to its counters is no fault of the kernel.
    if "Device not supported" in done.stdout + done.stderr:
        raise Skip("compute-sanitizer does not support the device")
    lines = (done.stdout + done.stderr).strip().splitlines()
    row = {"op": "on-chip kernel, without torch", "shape": "", "dtype": "", "check": sanitizer or "same bits twice"}
    yield {**row, "result": "failed" if done.returncode else "passed", "note": "; ".join(lines[-3:])[-300:]}
