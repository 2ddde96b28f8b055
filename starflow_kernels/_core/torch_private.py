"""Every private symbol of torch that this package uses, checked with torch 2.13.0."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

__all__ = [
    "disable_autocast",
    "flash_attention_backward_cpu",
    "flash_attention_backward_cuda",
    "flash_attention_cpu",
    "flash_attention_cuda",
    "is_in_torch_dispatch_mode",
    "is_in_transform",
]

disable_autocast = torch._C._DisableAutocast
"""Context manager that turns off autocast; it is cheaper than torch.autocast(enabled=False)."""

flash_attention_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_attention_backward_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
flash_attention_cuda = torch.ops.aten._flash_attention_forward
flash_attention_backward_cuda = torch.ops.aten._flash_attention_backward


def is_in_transform() -> bool:
    """Return whether a transform of torch.func is active."""
    return torch._C._functorch.maybe_current_level() is not None
