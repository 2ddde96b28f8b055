"""Progress of sampling: ops report to the callback that their caller has set."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TypeVar

from .._core.torch_private import outside_graphs

Result = TypeVar("Result")
_callback: ContextVar[Callable[[int, int], None] | None] = ContextVar("progress", default=None)


@contextlib.contextmanager
def reporting_to(callback: Callable[[int, int], None] | None) -> Iterator[None]:
    """Make `report` call `callback` inside the context, or nothing."""
    token = _callback.set(callback)
    try:
        yield
    finally:
        _callback.reset(token)


@outside_graphs("`progress` of block_inverse needs values outside of the graph")
def observed(run: Callable[[], Result], callback: Callable[[int, int], None]) -> Result:
    """Return the result of an op that reports to a callback.

    Args:
        run: calls the op.
        callback: called as callback(done, total) with numbers of tokens.
    """
    with reporting_to(callback):
        return run()


def report(done: int, total: int) -> None:
    """Call the callback, if one is set, with the number of finished tokens. An exception from it ends the op."""
    if callback := _callback.get():
        # The callback may sample too, which is no progress of this op.
        with reporting_to(None):
            callback(done, total)


def reporting() -> bool:
    """Return whether a callback is set; without one, a backend need not wait for its device."""
    return _callback.get() is not None
