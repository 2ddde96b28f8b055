"""Loading of the compiled libraries of csrc/ at first use, and registration of their kernels."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType

import torch

from . import dispatch
from .quota import granted_cores
from .torch_private import constant_in_graphs

FOLDER = Path(__file__).parents[1]
# `empty` requests huge pages for tensors of at least this many values.
HUGE_PAGES_FROM = 2**20


def load_error(name: str, title: str) -> str | None:
    """Load the library _<name>.abi3.so. Returns None, or the reason why not, which calls it `title`."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        return f"{title} kernels need torch >= 2.10, this is {torch.__version__}"
    library, note = FOLDER / f"_{name}.abi3.so", FOLDER / f"_{name}.txt"
    if not library.exists():
        why = f"the build did not set STARFLOW_{name.upper()}=1"
        if note.exists():
            why = note.read_text(encoding="utf-8").strip()
        elif (FOLDER.parent / "setup.py").exists() and not any(FOLDER.glob("_native.*")):
            why = (
                f"no compiled library in {FOLDER}; this is a source tree: install it with "
                "`pip install --no-build-isolation -e .`, or start Python elsewhere"
            )
        return f"no {title} kernels: {why}"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{title} kernels do not load: {error}"
    return None


@functools.cache
def _native_load_error() -> str | None:
    error = load_error("native", "native")
    if error is None and (cores := granted_cores()):
        torch.ops.starflow_native.limit_cores(cores)
    return error


@constant_in_graphs
def native_unavailable() -> str | None:
    """Load the CPU kernels. Returns None, or why they cannot be used."""
    return _native_load_error()


@functools.cache
def cuda_load_error() -> str | None:
    """Load the CUDA kernels; loading needs no GPU. Returns None, or why they cannot be loaded."""
    return load_error("cuda", "CUDA")


def cuda_unavailable() -> str | None:
    """Load the CUDA kernels. Returns None, or why they cannot be used."""
    if reason := cuda_load_error():
        return reason
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return "CUDA kernels need compute capability 8.0"
    return None


class _Memory:
    """Memory of large tensors that are gone, for the next ones."""

    def __init__(self) -> None:
        self._free: list[torch.Tensor] | None = []

    def take(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialized tensor (count,)."""
        free, size = self._free or [], count * dtype.itemsize
        found = min((i for i in range(len(free)) if len(free[i]) >= size), key=lambda i: len(free[i]), default=None)
        memory = _large(size, dtype=torch.uint8) if found is None else free.pop(found)
        # The tensor keeps this object, with which its memory becomes free.
        owner = (ctypes.c_byte * size).from_address(memory.data_ptr())
        weakref.finalize(owner, self._keep, memory).atexit = False
        return torch.frombuffer(owner, dtype=dtype)

    def _keep(self, memory: torch.Tensor) -> None:
        if self._free is not None:
            self._free.append(memory)

    def end(self) -> None:
        """Free the memory, from now on as soon as its tensor is gone."""
        self._free = None


_memory: ContextVar[_Memory | None] = ContextVar("memory", default=None)


@contextlib.contextmanager
def reused_memory() -> Iterator[None]:
    """Let `empty` reuse the memory of its large tensors that are gone, since new pages take long to get."""
    memory = _Memory()
    token = _memory.set(memory)
    try:
        yield
    finally:
        _memory.reset(token)
        memory.end()


def _large(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    torch.ops.starflow_native.use_huge_pages(tensor)
    return tensor


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return an uninitialized CPU tensor for a kernel; a large one uses huge pages, or `reused_memory`."""
    if (count := math.prod(shape)) < HUGE_PAGES_FROM:
        return torch.empty(shape, dtype=dtype, device="cpu")
    if memory := _memory.get():
        return memory.take(count, dtype).view(shape)
    return _large(*shape, dtype=dtype)


def refuse_tensors(dtypes: tuple[torch.dtype, ...], **tensors: torch.Tensor | None) -> str | None:
    """Return why the CPU kernels cannot take these tensors, or None."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device.type != "cpu":
            return f"it runs on the CPU, {name} is on {tensor.device}"
        if tensor is not None and tensor.dtype not in dtypes:
            *others, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
            accepted = f"{', '.join(others)} and {last}" if others else last
            return f"{name} is {tensor.dtype}, it takes {accepted}"
    return None


def register(op: str, module: ModuleType, backward: bool = True) -> None:
    """Register `<op>` and `<op>_backward` of a module as backend "native"; its `refuse` guards both."""
    dispatch.register(op, "native", getattr(module, op), module.refuse, native_unavailable)
    if backward:
        run = getattr(module, f"{op}_backward")
        dispatch.register(
            f"{op}_backward", "native", run, lambda grads, outputs, *args: module.refuse(*args), native_unavailable
        )
