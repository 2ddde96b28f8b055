"""What the Triton backends share: whether Triton is there, where its kernels run, and elementary functions."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable

import torch


@functools.cache
def missing() -> str | None:
    """Why Triton cannot be used, or None."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    return None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def refuse_tensors(*tensors: torch.Tensor | None) -> str | None:
    """Why kernels cannot take tensors of this device or dtype, or None."""
    for tensor in tensors:
        if tensor is None:
            continue
        if not (tensor.is_cuda or interpreted()):
            return f"it runs on CUDA, not on {tensor.device.type}"
        if tensor.dtype == torch.float64:
            return "it takes float32 and narrower"
        if interpreted() and tensor.dtype == torch.bfloat16:
            return "Triton's interpreter has no bfloat16 arithmetic"
    return None


def later(module: str, function: str) -> Callable:
    """The function of a module that imports Triton, imported at its first call."""
    return lambda *args: getattr(importlib.import_module(f"starflow_kernels.{module}"), function)(*args)
