"""The compiled library of csrc/, loaded at first use."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

HERE = Path(__file__).parents[1]
HUGE_PAGES_FROM = 2**20  # values


def load(name: str, kind: str) -> str | None:
    """Load the library _<name> beside this file; why it cannot be, or None. kind: of its kernels, in words."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        return f"{kind} kernels need torch >= 2.10, this is {torch.__version__}"
    library, note = HERE / f"_{name}.abi3.so", HERE / f"_{name}.txt"
    if not library.exists():
        why = note.read_text().strip() if note.exists() else "not built when the package was installed"
        return f"no {kind} kernels: {why}"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{kind} kernels do not load: {error}"
    return None


@functools.cache
def missing() -> str | None:
    """Why the native kernels cannot be used, or None; loads them."""
    return load("native", "native")


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Uninitialised CPU memory for a kernel, in huge pages where it is large."""
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    if tensor.numel() >= HUGE_PAGES_FROM:
        torch.ops.starflow_native.use_huge_pages(tensor)
    return tensor
