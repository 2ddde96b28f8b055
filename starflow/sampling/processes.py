"""Processes of torchrun that share the work of a run."""

from __future__ import annotations

import atexit
import datetime
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from ..errors import ConfigError, StarflowError

Result = TypeVar("Result")
# Longest time that the first process to finish waits for the last one.
PATIENCE = datetime.timedelta(days=7)
# Variables of torchrun beside WORLD_SIZE. Clusters set some of them for commands that torchrun does not start.
VARIABLES = ("RANK", "MASTER_ADDR", "MASTER_PORT")
# Seconds until all processes must have started, unless the variable JOIN_VARIABLE says otherwise.
JOIN_SECONDS = 60.0
JOIN_VARIABLE = "STARFLOW_JOIN_SECONDS"
# Seconds until a process says what it waits for, and then between two checks for signals.
SILENT_SECONDS = 5.0
POLL_SECONDS = 0.1
# Length of torch's reason in a message.
SHOWN_CHARACTERS = 160


class Processes:
    """Rank of this process and number of processes; one process without torchrun.

    Raises:
        ConfigError: a variable of torchrun is missing, or is no number.
    """

    def __init__(self):
        self.count, self.rank, self.local_rank = _number("WORLD_SIZE", 1) or 1, 0, 0
        if self.count == 1:
            return
        self.rank, self.local_rank = _number("RANK", 0), _number("LOCAL_RANK", 0)
        if missing := [name for name in VARIABLES if name not in os.environ]:
            raise ConfigError(
                f"WORLD_SIZE={self.count} is set, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not: "
                f"start with torchrun, or unset WORLD_SIZE to run as a single process"
            )

    def join(self, backend: str = "gloo") -> None:
        """Wait until all processes have started, for up to STARFLOW_JOIN_SECONDS (an environment variable) seconds.

        Args:
            backend: backends of torch.distributed by device, such as "cpu:gloo,cuda:nccl".

        Raises:
            StarflowError: a process did not start in time.
        """
        if self.count == 1 or dist.is_initialized():
            return
        seconds = _number(JOIN_VARIABLE, JOIN_SECONDS)
        limit = datetime.timedelta(seconds=seconds)
        address = os.environ["MASTER_ADDR"], int(_number("MASTER_PORT", 0))
        run = f"the {self.count} processes of this run at {':'.join(map(str, address))}, as rank {self.rank}"

        def meet() -> None:
            if self.rank:
                _await_server(address, seconds)
            store, rank, count = next(dist.rendezvous("env://", timeout=limit))
            store.set(f"starflow/{rank}", "")
            store.wait([f"starflow/{other}" for other in range(count)], limit)
            store.set_timeout(PATIENCE)
            dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=PATIENCE)
            # A thread of the group that outlives the interpreter can abort the process.
            atexit.register(_leave)

        try:
            _interruptible(meet, f"waiting for {run}, up to {seconds:g} s")
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error).partition("\n")[0][:SHOWN_CHARACTERS].rstrip(".")
            raise StarflowError(
                f"could not join {run}, within {seconds:g} s ({JOIN_VARIABLE}): {reason}; start all of them, or unset "
                f"WORLD_SIZE to run a single process"
            ) from error

    def first(self, action: Callable[[], Result]) -> Result:
        """Run an action on rank 0; every process gets the result, or raises its StarflowError."""
        if self.count == 1:
            return action()
        sent = None, None
        if self.rank == 0:
            try:
                sent = action(), None
            except StarflowError as error:
                sent = None, error
        box = [sent]
        self._together(lambda: dist.broadcast_object_list(box))
        result, error = box[0]
        if error is not None:
            raise error
        return result

    def gather(self, value: Result) -> list[Result]:
        """Wait for all processes; return the value of each, in the order of ranks."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        self._together(lambda: dist.all_gather_object(values, value))
        return values

    def collect(self, value: Result) -> list[Result] | None:
        """Wait for all processes; rank 0 gets the value of each, in the order of ranks, the others get None."""
        if self.count == 1:
            return [value]
        values: list[Any] | None = None if self.rank else [None] * self.count
        self._together(lambda: dist.gather_object(value, values))
        return values

    def _together(self, action: Callable[[], None]) -> None:
        self.join()
        try:
            _interruptible(action)
        except RuntimeError as error:
            raise StarflowError("another process of this run has ended, see its message") from error


def _number(name: str, default: float) -> float:
    """Return a number in an environment variable, of the type of the default and not negative."""
    text = os.environ.get(name) or str(default)
    try:
        value = type(default)(text)
    except ValueError:
        value = -1
    if not 0 <= value < math.inf:
        raise ConfigError(f"environment variable {name}={text!r}: expected a number of at least 0")
    return value


def _await_server(address: tuple[str, int], seconds: float) -> None:
    """Wait until the first process listens. torch would print a trace of its own if it does not."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(address, timeout=1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_SECONDS)


def _interruptible(action: Callable[[], None], waiting: str = "") -> None:
    """Run an action in a thread, because torch lets no signal interrupt its own waiting.

    Args:
        action: function that waits for other processes.
        waiting: message to print on stderr if the action takes long.
    """
    errors: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(SILENT_SECONDS)
    if waiting and thread.is_alive():
        print(waiting, file=sys.stderr, flush=True)
    try:
        while thread.is_alive():
            thread.join(POLL_SECONDS)
    except BaseException:
        # Leaving would wait for the action.
        atexit.unregister(_leave)
        raise
    if errors:
        raise errors[0]


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
