"""Availability of Triton, registration of its backends, and `warmup`.

Triton is imported at the first call with tensors on a device that Triton runs on.
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
    """Return whether kernels run in Triton's interpreter, on the CPU."""
    # Triton reads this variable only once, when it is imported.
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def unavailable() -> str | None:
    """Return why Triton cannot be used on this machine, or None."""
    if not interpreted() and torch.cuda.device_count() == 0:
        return "torch sees no GPU, and TRITON_INTERPRET is not 1"
    try:
        spec = importlib.util.find_spec("triton")
    except ImportError:
        spec = None
    return None if spec else "triton is not installed"


@functools.cache
def _module(name: str):
    """Import a module of this package; return it, or the reason why it cannot be imported."""
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
    """Return why kernels cannot take tensors of these dtypes, or None."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return "it takes float32 and narrower"
        if tensor is not None and tensor.dtype == torch.bfloat16 and interpreted():
            return "Triton's interpreter has no bfloat16 arithmetic"
    return None


def contiguous(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Return contiguous versions of the tensors; None stays None."""
    return [None if t is None else t.contiguous() for t in tensors]


def _deferred(name: str, function: str, refuse: str) -> tuple[Callable, Callable]:
    """Return run and refuse functions that import the module `name` at their first call."""

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
    """Register the functions of a module as the backend "triton" of an op.

    `refuse` and `refuse_backward` of the module see only tensors on a device that Triton runs on. Kernels are launched
    on the device of the first tensor.

    Args:
        op: name of the op, and of the function in the module.
        module: module of this package; None: <op>.triton.
        backward: register `<op>_backward` too.
    """
    module = module or f"{op}.triton"
    dispatch.register(op, "triton", *_deferred(module, op, "refuse"), unavailable)
    if backward:
        run, refuse = _deferred(module, f"{op}_backward", "refuse_backward")
        dispatch.register(f"{op}_backward", "triton", run, refuse, unavailable)


def warmup(op: Callable, *args, **options) -> None:
    """Compile the Triton kernels that op(*args, **options) launches, and run them once, so that no later call waits.

    There is no autotuning: dtypes and widths determine the block sizes. Triton caches compiled kernels on disk.

    Args:
        op: an op of this package with a Triton backend.
        args: positional arguments of the call. Only shape, dtype and requires_grad of a tensor are used, so it may be a
            meta tensor, and a batch of one is enough. If a tensor requires a gradient, the backward kernels for a loss
            that uses every output are compiled too.
        options: keyword arguments of the call, without `backend`.

    Raises:
        ValueError: Triton cannot run the call; the message gives the reason.
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
