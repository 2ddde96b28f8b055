"""Batch buckets, sessions that are kept between calls, and the replay of their steps, in Python without Triton.

A batch is padded to a bucket, a power of two. A session holds all buffers of one bucket, and a step that always has the
same launches; on a GPU the step is a CUDA graph, captured once. Callers pass three functions: one that returns the size
of a session, one that opens it, and one that waits for the device.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

import torch

from ..progress import report, reporting

# Largest number of progress reports per part; each of them waits for the device.
REPORTS = 16


class Shape(NamedTuple):
    """Sizes of the part of a batch that a session takes. Together with the model they identify its graph.

    cond: conditions per row: 0, 1, or one per token. fills: whether given tokens fill the cache before the first step.
    """

    samples: int
    tokens: int
    prefix: int
    branches: int
    cond: int
    rule: str
    fills: bool = False


class Session(Protocol):
    """Interface of a session that `loaded` and `sample` use."""

    def load(self, z: torch.Tensor, context: tuple, temperature: float) -> None:
        """Copy in a part of a batch and start its first token."""
        ...

    def step(self) -> None:
        """Compute one token of every sample."""
        ...

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return data x and log sigma (samples, T, D)."""
        ...


def bucket(samples: int) -> int:
    """Return the smallest power of two that is at least `samples`."""
    return 1 << max(samples - 1, 0).bit_length()


def largest(samples: int, size: Callable[[int], int], budget: int) -> int:
    """Return the largest bucket for `samples` whose size in bytes fits the budget, at least 1."""
    most = bucket(samples)
    while most > 1 and size(most) > budget:
        most //= 2
    return most


def parts(samples: int, most: int) -> Iterator[slice]:
    """Return slices that split a batch into parts of at most `most` samples."""
    return (slice(first, min(first + most, samples)) for first in range(0, samples, most))


class Sessions:
    """Sessions that are kept between calls within a budget of bytes; the least recently used are dropped first.

    The sessions of a model are dropped with the model.
    """

    def __init__(self):
        self._calls, self._depth = threading.RLock(), 0
        self._kept: OrderedDict[tuple, tuple[int, Session]] = OrderedDict()
        self._numbers = itertools.count()
        self._models: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()
        # Guards _kept and _models.
        self._change = threading.Lock()
        # Numbers of models that no longer exist.
        self._ended: deque[int] = deque()

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Session]:
        return iter([session for _, session in list(self._kept.values())])

    @property
    def bytes(self) -> int:
        """Bytes of all kept sessions."""
        return sum(size for size, _ in list(self._kept.values()))

    @contextlib.contextmanager
    def reserved(self) -> Iterator[None]:
        """Reserve all sessions for one call; calls of other threads wait.

        A call within this one, such as that of a progress callback, gets sessions of its own.
        """
        with self._calls:
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1

    def get(self, model: object, key: tuple, size: int, budget: int, opened: Callable[[], Session]) -> Session:
        """Return a session of a model, and open it if it is not kept.

        Args:
            model: owner of the session.
            key: identifies the session among those of the model.
            size: bytes of the session.
            budget: bytes of all sessions; others are dropped before this one is opened.
            opened: opens the session.
        """
        self._drop_ended()
        with self._change:
            if model not in self._models:
                self._models[model] = number = next(self._numbers)
                weakref.finalize(model, self._end, number)
            place = (self._models[model], self._depth, *key)
            if place not in self._kept:
                while self._kept and self.bytes + size > budget:
                    self._kept.popitem(last=False)
                # Buffers made in inference mode could not be written outside it.
                with torch.inference_mode(False), torch.no_grad():
                    self._kept[place] = size, opened()
            self._kept.move_to_end(place)
            found = self._kept[place][1]
        self._drop_ended()
        return found

    def _end(self, number: int) -> None:
        self._ended.append(number)
        self._drop_ended()

    def _drop_ended(self) -> None:
        # A finalizer runs in any thread at any time, also in one that holds the lock; then `get` drops them.
        while self._ended and self._change.acquire(blocking=False):
            try:
                ended = {self._ended.popleft() for _ in range(len(self._ended))}
                for place in [place for place in self._kept if place[0] in ended]:
                    del self._kept[place]
            finally:
                self._change.release()


def captured(launch: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
    """Return a CUDA graph of the kernels that `launch` launches on a device."""
    graph = torch.cuda.CUDAGraph()
    # The default stream of captures belongs to the device of the first one, and the default mode forbids other threads
    # to allocate memory.
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"):
        launch()
    return graph


def current_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Return the current stream of a GPU, or None for another device."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def lend(tensors: Iterable[torch.Tensor], home: torch.cuda.Stream | None, device: torch.device) -> None:
    """Let the current stream read tensors that were made on the stream `home`, also after they have been freed."""
    stream = current_stream(device)
    if stream is not None and stream != home:
        for tensor in tensors:
            tensor.record_stream(stream)


def replay(step: Callable[[], None], steps: int, wait: Callable[[], None], done: Callable[[int], None]) -> None:
    """Run `steps` steps; wait for the device only if progress is reported.

    Args:
        step: runs one step.
        steps: how many.
        wait: waits for the device.
        done: takes the number of steps done.
    """
    every = max(1, -(-steps // REPORTS)) if reporting() else max(1, steps)
    for first in range(0, steps, every):
        last = min(first + every, steps)
        for _ in range(first, last):
            step()
        if reporting():
            wait()
        done(last)


def replay_until_done(
    step: Callable[[], None], ask: Callable[[], Callable[[], int]], tokens: int, most: int, done: Callable[[int], None]
) -> None:
    """Run steps until all tokens are done.

    The count after one step is read while the next step runs. If all tokens were done, that step does nothing.

    Args:
        step: runs one step.
        ask: starts counting finished tokens on the device, and returns a function that waits for the count.
        tokens: number of all tokens.
        most: number of steps after which all tokens are done.
        done: takes the number of tokens done.

    Raises:
        RuntimeError: after `most` steps, tokens are left.
    """
    count, answer = 0, None
    for _ in range(most + 1):
        step()
        asked = ask()
        if answer:
            done(count := answer())
            if count == tokens:
                return
        answer = asked
    raise RuntimeError(f"{count} of {tokens} tokens are done after {most} replays: the device makes no progress")


def loaded(
    z: torch.Tensor,
    context: tuple,
    shape: Shape,
    temperature: float,
    size: Callable[[Shape], int],
    budget: int,
    session: Callable[[Shape], Session],
) -> Iterator[tuple[slice, Session]]:
    """Load a batch in parts that fit the budget; yield the rows and the session of each part.

    Args:
        z: (B, T, D), noise in the block's own order.
        context: cond, prefix, cos, sin, guidance and known of all rows.
        shape: sizes of the whole batch.
        temperature: divides the scores of the unconditional branch.
        size: size(shape) returns the bytes of a session.
        budget: most bytes of a session.
        session: session(shape) returns a session.
    """
    B = len(z)
    most = largest(B, lambda samples: size(shape._replace(samples=samples)), budget)
    cond, prefix, cos, sin, *per_sample = context
    for rows in parts(B, most):

        def branch_rows(value, rows=rows):
            return None if value is None else value.unflatten(0, (shape.branches, B))[:, rows]

        given = (None if value is None else value[rows] for value in per_sample)
        part = branch_rows(cond), branch_rows(prefix), cos, sin, *given
        opened = session(shape._replace(samples=bucket(rows.stop - rows.start)))
        opened.load(z[rows], part, temperature)
        yield rows, opened


def sample(
    z: torch.Tensor, steps: int, wait: Callable[[], None], running: Iterator[tuple[slice, Session]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Map noise z (B, T, D) to data x and log sigma, by running `steps` steps of the session of each part.

    Args:
        z: (B, T, D), in the block's own order.
        steps: number of steps per part.
        wait: waits for the device.
        running: rows and loaded session of each part.
    """
    (B, T, _), x, log_sigma = z.shape, torch.empty_like(z), torch.empty_like(z)
    for rows, opened in running:
        n = rows.stop - rows.start

        def done(step, rows=rows, n=n):
            report(rows.start * T + n * (step + T - steps), B * T)

        replay(opened.step, steps, wait, done)
        x[rows], log_sigma[rows] = (value[:n] for value in opened.result())
    return x, log_sigma
