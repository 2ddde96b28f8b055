"""What the Triton backends share: whether Triton can run here, registration, and what its kernels take.

Nothing here imports Triton before a tensor comes that its kernels can take.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable

import torch

from .._core import dispatch


@functools.cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU; Triton reads the switch once, when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def unavailable() -> str | None:
    """Why Triton cannot be used on this machine, or None."""
    if not interpreted() and torch.cuda.device_count() == 0:
        return "torch sees no GPU, and TRITON_INTERPRET is not 1"
    try:
        found = importlib.util.find_spec("triton")
    except ImportError:
        found = None
    return None if found else "triton is not installed"


@functools.cache
def _module(name: str):
    """A module of this package, or why it cannot be imported."""
    try:
        return importlib.import_module(f"starflow_kernels.{name}")
    except ImportError as error:
        return f"triton cannot be imported: {error}"


def _refuse_devices(args: tuple) -> str | None:
    for tensor in args:
        if isinstance(tensor, torch.Tensor) and not (tensor.is_cuda or interpreted()):
            return f"it runs on CUDA, not on {tensor.device.type}"
    return None


def refuse_tensors(*tensors: torch.Tensor | None) -> str | None:
    """Why kernels cannot take tensors of these dtypes, or None."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return "it takes float32 and narrower"
        if tensor is not None and tensor.dtype == torch.bfloat16 and interpreted():
            return "Triton's interpreter has no bfloat16 arithmetic"
    return None


def _deferred(name: str, function: str, refuse: str) -> tuple[Callable, Callable]:
    def run_later(*args):
        run = getattr(_module(name), function)
        if interpreted():
            return run(*args)
        with torch.cuda.device(next(a.device for a in args if isinstance(a, torch.Tensor))):
            return run(*args)

    def refuse_later(*args) -> str | None:
        if reason := _refuse_devices(args):
            return reason
        module = _module(name)
        return module if isinstance(module, str) else getattr(module, refuse)(*args)

    return run_later, refuse_later


def register(op: str, module: str | None = None, backward: bool = True) -> None:
    """Register the functions `op` and, with a gradient, `op_backward` of a module, by default <op>/triton.py, which
    `refuse` and `refuse_backward` guard.

    The guards see arguments on a device that Triton runs on, and launches happen on that device.
    """
    module = module or f"{op}.triton"
    dispatch.register(op, "triton", *_deferred(module, op, "refuse"), unavailable)
    if backward:
        dispatch.register(
            f"{op}_backward", "triton", *_deferred(module, f"{op}_backward", "refuse_backward"), unavailable
        )


def warmup(op: Callable, *args, **options) -> None:
    """Compile the Triton kernels that op(*args, **options) launches and run them once, so that no later call waits.

    Nothing is tuned: block sizes are fixed by dtype and widths. Compiled kernels stay in Triton's cache on disk.

    Args:
        op: an op of this package with a Triton backend.
        args, options: those of the call, without `backend`. Of a tensor only shape, dtype and requires_grad matter: it
            may be a meta tensor, and a batch of one is enough. Where one requires a gradient, the gradient's kernels
            are compiled too, for a loss that uses every output.

    Raises:
        ValueError: Triton cannot run the call, with the reason.
    """
    if reason := unavailable():
        raise ValueError(f"no Triton kernels to compile: {reason}")
    device = "cpu" if interpreted() else "cuda"

    def stand_in(value):
        if not isinstance(value, torch.Tensor):
            return value
        return torch.zeros(value.shape, dtype=value.dtype, device=device, requires_grad=value.requires_grad)

    with torch.enable_grad():
        options = {name: stand_in(value) for name, value in options.items()}
        outputs = op(*(stand_in(value) for value in args), **options, backend="triton")
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    if any(output.requires_grad for output in outputs):
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    if device == "cuda":
        torch.cuda.synchronize()
