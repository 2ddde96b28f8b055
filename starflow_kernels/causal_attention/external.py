"""Parts shared by the backends that call fused attention of other packages: limits on a GPU, and the rotation.

The other packages do not rotate. The rotation is one small Triton kernel where Triton runs, else plain PyTorch.
"""

from __future__ import annotations

import contextlib

import torch

from .._core import numerics
from .._triton import runtime


def refuse_heads(q: torch.Tensor) -> str | None:
    """Return why flash-attn and torch's copy of it cannot take queries like q on a GPU, or None."""
    if not q.is_cuda:
        return f"it runs on CUDA, not on {q.device.type}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"q is {q.dtype}, it takes bfloat16 and float16"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"heads of {q.shape[-1]} values, it takes multiples of 8 up to 256"
    if torch.version.hip is None and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "it needs sm_80 or newer"
    return None if q.numel() else "there are no queries"


def _rotary_kernels(x: torch.Tensor):
    """Return the module with the Triton kernels if they take x, else None."""
    on_device = x.is_cuda or runtime.interpreted()
    if not on_device or runtime.unavailable() or runtime.refuse_tensors(x) or x.numel() >= 2**31:
        return None
    try:
        from .._triton import rotary
    except ImportError:
        return None
    return rotary


def _on_device(x: torch.Tensor):
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def apply_rotary(x: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None, rotary: str) -> torch.Tensor:
    """Rotate x (B, T, H, d); the values of a head may be reordered.

    The order is the same for all tensors of a device and dtype, so that products of two rotated tensors are correct.
    """
    kernels = None if rotary == "none" else _rotary_kernels(x)
    if kernels is None:
        return numerics.apply_rotary(x, cos, sin, rotary)
    (x,) = numerics.last_dim_contiguous(x)
    with _on_device(x):
        return kernels.apply_rotary(x, *kernels.angles(cos, sin), rotary)


def undo_rotary(x: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None, rotary: str) -> torch.Tensor:
    """Undo `apply_rotary`. This also maps the gradient of its result to the gradient of its argument."""
    kernels = None if rotary == "none" else _rotary_kernels(x)
    if kernels is None:
        return numerics.undo_rotary(x, cos, sin, rotary)
    with _on_device(x):
        return kernels.undo_rotary(x, *kernels.angles(cos, sin), rotary)
