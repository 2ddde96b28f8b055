"""The compiled library of csrc/, loaded at first use."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

HERE = Path(__file__).parent
HUGE_PAGES_FROM = 2**20  # values


@functools.cache
def missing() -> str | None:
    """Why the native kernels cannot be used, or None; loads them."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        return f"native kernels need torch >= 2.10, this is {torch.__version__}"
    library, note = HERE / "_native.abi3.so", HERE / "_native.txt"
    if not library.exists():
        why = note.read_text().strip() if note.exists() else "not built when the package was installed"
        return f"no native kernels: {why}"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"native kernels do not load: {error}"
    return None


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Uninitialised CPU memory for a kernel, in huge pages where it is large."""
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    if tensor.numel() >= HUGE_PAGES_FROM:
        torch.ops.starflow_native.use_huge_pages(tensor)
    return tensor
