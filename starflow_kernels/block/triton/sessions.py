"""The static engine of a sampling device: batch buckets, sessions that are kept, and their replays. Plain Python.

A session holds all buffers of one bucket and a step that is always the same launches: on a GPU a CUDA graph, captured
once. The device is known by three functions alone: what a session takes, how it is opened, and how to wait for it.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch

from ..progress import report, reporting

# Waits for the device and reports of a part, at most.
REPORTS = 16


class Shape(NamedTuple):
    """What a session is made for: with the model, the key of its graph."""

    samples: int
    tokens: int
    prefix: int
    copies: int
    cond: bool
    rule: str


class Session(Protocol):
    """load() takes a part and starts its first token, step() makes one token, result() gives (samples, T, D)."""

    def load(self, z: torch.Tensor, context: tuple, temperature: float) -> None: ...
    def step(self) -> None: ...
    def result(self) -> torch.Tensor: ...


def bucket(samples: int) -> int:
    """The power of two that holds so many samples."""
    return 1 << max(samples - 1, 0).bit_length()


def largest(samples: int, size: Callable[[int], int], budget: int) -> int:
    """The largest bucket for that many samples whose size fits the budget; one sample is always tried."""
    found = bucket(samples)
    while found > 1 and size(found) > budget:
        found //= 2
    return found


def parts(samples: int, most: int) -> Iterator[slice]:
    """The batch in parts of at most `most`."""
    return (slice(first, min(first + most, samples)) for first in range(0, samples, most))


class Sessions:
    """Sessions that are kept, within a budget of bytes; those unused for longest go first, a model's go with it."""

    def __init__(self):
        self.lock = threading.RLock()
        self._kept: OrderedDict[tuple, tuple[int, Session]] = OrderedDict()
        self._numbers = itertools.count()
        self._models: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def bytes(self) -> int:
        return sum(size for size, _ in self._kept.values())

    def get(self, model: object, key: tuple, size: int, budget: int, opened: Callable[[], Session]) -> Session:
        """The session of a model, opened where there is none; room is made before that."""
        if model not in self._models:
            self._models[model] = number = next(self._numbers)
            weakref.finalize(model, self._drop, number)
        place = (self._models[model], *key)
        if place not in self._kept:
            while self._kept and self.bytes + size > budget:
                self._kept.popitem(last=False)
            self._kept[place] = size, opened()
        self._kept.move_to_end(place)
        return self._kept[place][1]

    def _drop(self, number: int) -> None:
        for place in [place for place in list(self._kept) if place[0] == number]:
            self._kept.pop(place, None)


def replay(step: Callable[[], None], steps: int, wait: Callable[[], None], done: Callable[[int], None]) -> None:
    """`steps` steps one after the other; the device is waited for only where somebody asks for reports."""
    every = max(1, -(-steps // REPORTS)) if reporting() else max(1, steps)
    for first in range(0, steps, every):
        last = min(first + every, steps)
        for _ in range(first, last):
            step()
        if reporting():
            wait()
        done(last)


def replay_until_done(step: Callable[[], None], ask: Callable[[], Callable[[], int]], tokens: int, done) -> None:
    """Replays until the device has all tokens; what one has left is read while the next runs, which does nothing then.

    ask() has the device say how many tokens are done, and gives a function that waits for the answer.
    """
    answer = None
    while True:
        step()
        asked = ask()
        if answer:
            done(found := answer())
            if found == tokens:
                return
        answer = asked


def loaded(
    z: torch.Tensor,
    context: tuple,
    shape: Shape,
    temperature: float,
    size: Callable[[Shape], int],
    budget: int,
    session: Callable[[Shape], Session],
) -> Iterator[tuple[slice, Session]]:
    """z (B, T, D) in the block's own order in parts that fit the budget: their rows, and the session that has them.

    context: cond, prefix, cos, sin and guidance of all rows. shape: that of the call, whose samples are all of B.
    """
    B = len(z)
    most = largest(B, lambda samples: size(shape._replace(samples=samples)), budget)
    cond, prefix, cos, sin, guidance = context
    for rows in parts(B, most):

        def both(value, rows=rows):
            return None if value is None else value.unflatten(0, (shape.copies, B))[:, rows]

        given = both(cond), both(prefix), cos, sin, None if guidance is None else guidance[rows]
        opened = session(shape._replace(samples=bucket(rows.stop - rows.start)))
        opened.load(z[rows], given, temperature)
        yield rows, opened


def sample(
    z: torch.Tensor, steps: int, wait: Callable[[], None], running: Iterator[tuple[slice, Session]]
) -> torch.Tensor:
    """x of z (B, T, D), whose parts run in their sessions for so many steps."""
    (B, T, _), x = z.shape, torch.empty_like(z)
    for rows, opened in running:
        n = rows.stop - rows.start

        def done(step, rows=rows, n=n):
            report(rows.start * T + n * (step + T - steps), B * T)

        replay(opened.step, steps, wait, done)
        x[rows] = opened.result()[:n]
    return x
