"""How far a sampler is: ops report to the callback that their caller has set."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

_callback: ContextVar[Callable[[int, int], None] | None] = ContextVar("progress", default=None)


@contextlib.contextmanager
def reporting_to(callback: Callable[[int, int], None]) -> Iterator[None]:
    """Inside, `report` calls callback; an outer callback comes back afterwards."""
    token = _callback.set(callback)
    try:
        yield
    finally:
        _callback.reset(token)


def report(done: int, total: int) -> None:
    """Tell the callback, if there is one, that `done` of `total` are done. What it raises ends the op."""
    if callback := _callback.get():
        callback(done, total)


def reporting() -> bool:
    """Whether there is a callback: what is not reported need not be waited for."""
    return _callback.get() is not None
