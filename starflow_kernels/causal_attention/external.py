"""What the fused attentions of other packages share: what they take on a GPU, and the rotation that they lack.

The rotation is one small Triton kernel where Triton runs, else torch's.
"""

from __future__ import annotations

import contextlib

import torch

from .._core import numerics
from .._triton import runtime


def refuse_heads(q: torch.Tensor) -> str | None:
    """Why the kernels of flash-attn, torch's copy of them too, cannot take queries like these on a GPU, or None."""
    if not q.is_cuda:
        return f"it runs on CUDA, not on {q.device.type}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"q is {q.dtype}, it takes bfloat16 and float16"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"heads of {q.shape[-1]} values, it takes multiples of 8 up to 256"
    if torch.version.hip is None and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "it needs sm_80 or newer"
    return None if q.numel() else "there are no queries"


def adjacent(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Tensors (B, T, H, d) with the values of a head adjacent."""
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def _kernels(x: torch.Tensor):
    """The module with the kernels where they take x."""
    here = x.is_cuda or runtime.interpreted()
    if not here or runtime.unavailable() or runtime.refuse_tensors(x) or x.numel() >= 2**31:
        return None
    try:
        from .._triton import rotary
    except ImportError:
        return None
    return rotary


def _on(x: torch.Tensor):
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def turn(x: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None, rotary: str) -> torch.Tensor:
    """x (B, T, H, d) rotated, its values perhaps in another order: the same one for every tensor of a device and dtype,
    so that products of two of them are those of numerics.apply_rotary."""
    kernels = None if rotary == "none" else _kernels(x)
    if kernels is None:
        return numerics.apply_rotary(x, cos, sin, rotary)
    with _on(x):
        return kernels.turned(kernels.adjacent(x), *kernels.angles(cos, sin), rotary)


def turn_back(x: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None, rotary: str) -> torch.Tensor:
    """The opposite of `turn`: of a gradient with respect to its result that with respect to its argument."""
    kernels = None if rotary == "none" else _kernels(x)
    if kernels is None:
        return numerics.undo_rotary(x, cos, sin, rotary)
    with _on(x):
        return kernels.turned_back(x, *kernels.angles(cos, sin), rotary)
