"""Backend choice: the first backend of an op that takes the arguments, or the one that the caller names."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class Kernel(NamedTuple):
    """`run(*op arguments)` computes the op; `refuse(*op arguments)` says why it cannot, or returns None; `missing()`
    says why it cannot run anything on this machine, or returns None."""

    run: Callable
    refuse: Callable[..., str | None]
    missing: Callable[[], str | None]


_kernels: dict[str, dict[str, Kernel]] = {}


def register(
    op: str,
    backend: str,
    run: Callable,
    refuse: Callable[..., str | None] = lambda *args: None,
    missing: Callable[[], str | None] = lambda: None,
) -> None:
    """Add a backend to an op; those registered later are preferred."""
    others = {name: kernel for name, kernel in _kernels.get(op, {}).items() if name != backend}
    _kernels[op] = {backend: Kernel(run, refuse, missing), **others}


def choose(op: str, *args) -> str:
    """Name of the first backend of `op` that takes these arguments."""
    kernels = _kernels[op].items()
    return next(name for name, k in kernels if k.missing() is None and k.refuse(*args) is None)


def run(op: str, backend: str | None, *args):
    """Call `op` on the backend that is named, or on the first that takes these arguments.

    Raises ValueError for an unknown backend and for a named backend that cannot run, with the reason.
    """
    kernels = _kernels[op]
    if backend is not None:
        if backend not in kernels:
            raise ValueError(f"backend={backend!r}: {op} has {', '.join(map(repr, kernels))}")
        if reason := kernels[backend].missing() or kernels[backend].refuse(*args):
            raise ValueError(f"backend={backend!r} cannot run {op}: {reason}")
    kernel = kernels[backend or choose(op, *args)]
    # The ops compute in the dtypes of their inputs; autocast has acted before them.
    with torch._C._DisableAutocast():
        return kernel.run(*args)


def backends() -> dict[str, dict[str, str]]:
    """The backends of each op, most preferred first: "available", or the reason why it is not on this machine."""
    return {
        op: {name: kernel.missing() or "available" for name, kernel in kernels.items()}
        for op, kernels in sorted(_kernels.items())
        if not op.endswith("_backward")
    }
