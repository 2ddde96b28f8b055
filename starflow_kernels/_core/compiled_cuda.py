"""The compiled CUDA kernels of csrc/cuda, loaded at first use; they load where there is no GPU."""

from __future__ import annotations

import functools

import torch

from .compiled import load


@functools.cache
def unbuilt() -> str | None:
    """Why the library is not there, or None; loads it."""
    return load("cuda", "CUDA")


def missing() -> str | None:
    """Why the kernels cannot be used, or None."""
    if reason := unbuilt():
        return reason
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return "CUDA kernels need compute capability 8.0"
    return None
