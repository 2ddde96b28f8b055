"""CUDA kernels of csrc/cuda, built for the CPU, where csrc/emulation/fibers.h executes their threads."""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from starflow_kernels._core import compiled

ROOT = Path(__file__).parents[2]


@functools.cache
def load(kernel: str):
    """Build "onchip" or "persistent" with the binding that it has on a GPU, and return its ops."""
    if reason := compiled.native_unavailable():
        pytest.skip(reason)
    from torch.utils import cpp_extension

    sanitize = os.environ.get("STARFLOW_SANITIZE")
    flags = [f"-fsanitize={sanitize}", "-O0", "-g"] if sanitize else ["-O2"]
    name = f"starflow_emulated_{kernel}"
    defines = [f"STARFLOW_LIBRARY={name}", "STARFLOW_DEVICES=CPU", "TORCH_TARGET_VERSION=0x020a000000000000"]
    command = ["g++", "-std=c++20", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-fPIC", "-shared", *flags]
    command += [*(f"-isystem{path}" for path in cpp_extension.include_paths()), *(f"-D{define}" for define in defines)]
    command += [str(ROOT / "csrc" / folder / f"{kernel}.cpp") for folder in ("bindings", "emulation")]
    libraries = [*(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch_cpu", "-lc10"]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "emulated.so"
        done = subprocess.run([*command, "-o", str(target), *libraries], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        torch.ops.load_library(target)
    return getattr(torch.ops, name)
