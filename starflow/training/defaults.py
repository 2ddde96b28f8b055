"""Defaults of torch while a model is made or trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def standard_defaults() -> Iterator[None]:
    """Let new modules and the internals of torch use float32 and the CPU, whatever the defaults of torch are."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)
