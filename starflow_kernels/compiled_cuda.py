"""The compiled CUDA kernels of csrc/cuda, loaded at first use; they load where there is no GPU."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

HERE = Path(__file__).parent


@functools.cache
def unbuilt() -> str | None:
    """Why the library is not there, or None; loads it."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        return f"CUDA kernels need torch >= 2.10, this is {torch.__version__}"
    library, note = HERE / "_cuda.abi3.so", HERE / "_cuda.txt"
    if not library.exists():
        why = note.read_text().strip() if note.exists() else "not built when the package was installed"
        return f"no CUDA kernels: {why}"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"CUDA kernels do not load: {error}"
    return None


def missing() -> str | None:
    """Why the kernels cannot be used, or None."""
    if reason := unbuilt():
        return reason
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return "CUDA kernels need compute capability 8.0"
    return None
