"""Choice of a backend: the one the caller names, else the one measured fastest, else the first that can run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch

from .torch_private import disable_autocast


class Kernel(NamedTuple):
    """One backend of an op, as three functions.

    `run(*op arguments)` computes the op. `refuse(*op arguments)` returns why it cannot, or None. `unavailable()`
    returns why the backend cannot run on this machine, or None.
    """

    run: Callable
    refuse: Callable[..., str | None]
    unavailable: Callable[[], str | None]


class Preference(NamedTuple):
    """Measured choice between the backends of an op.

    `name(*op arguments)` returns the backend measured fastest for these arguments, or None. `here()` maps each backend
    that `name` can return on this machine to a description of the arguments.
    """

    name: Callable[..., str | None]
    here: Callable[[], dict[str, str]]


_kernels: dict[str, dict[str, Kernel]] = {}
_preferences: dict[str, Preference] = {}
_wrappers: dict[str, Callable] = {}
_loops: set[str] = set()
_warned: set[str] = set()


def register(
    op: str,
    backend: str,
    run: Callable,
    refuse: Callable[..., str | None] = lambda *args: None,
    unavailable: Callable[[], str | None] = lambda: None,
) -> None:
    """Add a backend to an op; backends registered later are preferred."""
    others = {name: kernel for name, kernel in _kernels.get(op, {}).items() if name != backend}
    _kernels[op] = {backend: Kernel(run, refuse, unavailable), **others}


def prefer(op: str, name: Callable[..., str | None], here: Callable[[], dict[str, str]]) -> None:
    """Try the backend that `name` returns first; if it cannot run the arguments, the usual order applies."""
    _preferences[op] = Preference(name, here)


def wrap(op: str, wrapper: Callable) -> None:
    """Run every backend of `op` as wrapper(run, *op arguments), which checks values before and after `run`.

    It is part of the op: unlike the checks of a public function, it acts in compiled and exported graphs too.
    """
    _wrappers[op] = wrapper


def mark_loop(op: str) -> None:
    """Warn once per reason where no kernel of `op` takes a call on a GPU, since its reference is a loop over tokens."""
    _loops.add(op)


def _warn_of_loop(op: str, args: tuple) -> None:
    if not (op in _loops and isinstance(args[0], torch.Tensor) and args[0].is_cuda):
        return
    others = ((name, kernel) for name, kernel in _kernels[op].items() if name != "reference")
    reasons = "; ".join(f"{name}: {kernel.unavailable() or kernel.refuse(*args)}" for name, kernel in others)
    text = f"{op} runs in plain PyTorch on the GPU, many times slower than a kernel. {reasons}"
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, stacklevel=2)


def choose(op: str, *args) -> str:
    """Return the name of the backend that runs `op` on these arguments when the caller names none."""
    kernels = _kernels[op]
    first = _preferences[op].name(*args) if op in _preferences else None
    order = (first, *kernels) if first in kernels else kernels
    return next(name for name in order if kernels[name].unavailable() is None and kernels[name].refuse(*args) is None)


def run(op: str, backend: str | None, *args):
    """Run `op` on the named backend, or on the one that `choose` returns.

    Raises:
        ValueError: the backend is unknown, or it cannot run, with the reason.
    """
    kernels = _kernels[op]
    if backend is not None:
        if backend not in kernels:
            raise ValueError(f"backend={backend!r}: {op} has {', '.join(map(repr, kernels))}")
        if reason := kernels[backend].unavailable() or kernels[backend].refuse(*args):
            raise ValueError(f"backend={backend!r} cannot run {op}: {reason}")
    name = backend or choose(op, *args)
    if backend is None and name == "reference":
        _warn_of_loop(op, args)
    run = kernels[name].run
    # Ops compute in the dtypes of their inputs, so autocast must not act inside them.
    with disable_autocast():
        return _wrappers[op](run, *args) if op in _wrappers else run(*args)


def backends() -> dict[str, dict[str, str]]:
    """List the backends of every op on this machine, in order of preference.

    Returns:
        Op -> backend -> "available", or the reason why it cannot run here. If a backend was measured fastest on
        a device of this machine, "; first choice" and the arguments to which this applies follow "available".
    """
    listing = {
        op: {name: kernel.unavailable() or "available" for name, kernel in kernels.items()}
        for op, kernels in sorted(_kernels.items())
        if not op.endswith("_backward")
    }
    for op in listing:
        for part in (op, f"{op}_backward"):
            for name, what in _preferences[part].here().items() if part in _preferences else ():
                if listing[op].get(name, "").startswith("available"):
                    listing[op][name] += f"; first choice {what}"
    return listing
