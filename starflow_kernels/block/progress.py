"""Progress of sampling: ops report to the callback that their caller has set."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

_callback: ContextVar[Callable[[int, int], None] | None] = ContextVar("progress", default=None)


@contextlib.contextmanager
def reporting_to(callback: Callable[[int, int], None] | None) -> Iterator[None]:
    """Make `report` call `callback` inside the context, or nothing."""
    token = _callback.set(callback)
    try:
        yield
    finally:
        _callback.reset(token)


def report(done: int, total: int) -> None:
    """Call the callback, if one is set, with the number of finished tokens. An exception from it ends the op."""
    if callback := _callback.get():
        # The callback may sample too, which is no progress of this op.
        with reporting_to(None):
            callback(done, total)


def reporting() -> bool:
    """Return whether a callback is set; without one, a backend need not wait for its device."""
    return _callback.get() is not None
