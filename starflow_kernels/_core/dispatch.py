"""Backend choice: the one that the caller names, else the one that was measured fastest, else the first that can."""

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


class Preference(NamedTuple):
    """`name(*op arguments)` gives the backend that was measured to be the fastest for them, or None; `here()` tells of
    each backend that it names on this machine for what."""

    name: Callable[..., str | None]
    here: Callable[[], dict[str, str]]


_kernels: dict[str, dict[str, Kernel]] = {}
_preferences: dict[str, Preference] = {}


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


def prefer(op: str, name: Callable[..., str | None], here: Callable[[], dict[str, str]]) -> None:
    """Put a backend first that depends on the arguments; where it cannot run them the others have their turn."""
    _preferences[op] = Preference(name, here)


def choose(op: str, *args) -> str:
    """Name of the backend of `op` that is preferred for these arguments, or of the first that takes them."""
    kernels = _kernels[op]
    first = _preferences[op].name(*args) if op in _preferences else None
    order = (first, *kernels) if first in kernels else kernels
    return next(name for name in order if kernels[name].missing() is None and kernels[name].refuse(*args) is None)


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
    """The backends of each op, most preferred first: "available", or the reason why it is not on this machine.

    Of a backend that was measured to be the fastest for some arguments on a device of this machine, and that they get
    where the caller names none: "available; first choice" and for which.
    """
    listing = {
        op: {name: kernel.missing() or "available" for name, kernel in kernels.items()}
        for op, kernels in sorted(_kernels.items())
        if not op.endswith("_backward")
    }
    for op in listing:
        for part in (op, f"{op}_backward"):
            for name, what in _preferences[part].here().items() if part in _preferences else ():
                if listing[op].get(name, "").startswith("available"):
                    listing[op][name] += f"; first choice {what}"
    return listing
