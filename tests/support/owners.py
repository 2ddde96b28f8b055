"""Races between the programs of a launch, found in Triton's interpreter.

Programs of a launch run in any order, at the same time. So no program may read or write what another one writes, unless
an atomic operation orders both: it releases what its program has done before, to programs whose later atomic on the
same address acquires it. For every launch, the interpreter here records who accesses each address, and a vector clock
per program tells what is ordered. A program is one unit: races between its own threads are not seen.

The programs also run in a random order, so that no test passes only because the interpreter runs them by number.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import torch

READ, WRITE, ATOMIC = range(3)
NAMES = ("reads", "writes", "changes by an atomic")
ACQUIRES = ("ACQUIRE", "ACQUIRE_RELEASE")
RELEASES = ("RELEASE", "ACQUIRE_RELEASE")


class Segment(NamedTuple):
    """What a program does between two of its atomics.

    Args:
        program: number of the program.
        number: how many segments of the program come before.
        seen: other program -> number of its last segment that is ordered before this one.
    """

    program: int
    number: int
    seen: dict[int, int]

    def follows(self, other: Segment) -> bool:
        """Return whether all accesses of the other segment are ordered before those of this one."""
        return other.program == self.program or self.seen.get(other.program, -1) >= other.number


class Launch:
    """Accesses of the programs of one launch."""

    def __init__(self):
        self.segments: list[Segment] = []
        self._current: dict[int, int] = {}
        # Address -> program -> number of its last segment that an atomic on this address has released.
        self._released: dict[int, dict[int, int]] = {}
        # Addresses, segment and kind of each access.
        self._accesses: list[tuple[np.ndarray, int, int]] = []

    def _segment(self, program: int) -> int:
        if program not in self._current:
            self._current[program] = len(self.segments)
            self.segments.append(Segment(program, 0, {}))
        return self._current[program]

    def access(self, program: int, pointers: np.ndarray, mask: np.ndarray, kind: int) -> np.ndarray:
        """Record an access of a program, and return its addresses."""
        addresses = np.unique(pointers[np.broadcast_to(mask, pointers.shape).astype(bool)])
        self._accesses.append((addresses, self._segment(program), kind))
        return addresses

    def atomic(self, program: int, pointers: np.ndarray, mask: np.ndarray, acquires: bool, releases: bool) -> None:
        """Record an atomic of a program; acquires, releases: its memory order, between all programs of the device."""
        addresses = self.access(program, pointers, mask, ATOMIC)
        before = self.segments[self._segment(program)]
        seen = dict(before.seen)
        for address in addresses.tolist():
            for other, number in self._released.get(address, {}).items() if acquires else ():
                seen[other] = max(seen.get(other, -1), number)
        for address in addresses.tolist() if releases else ():
            released = self._released.setdefault(address, {})
            for other, number in {**seen, program: before.number}.items():
                released[other] = max(released.get(other, -1), number)
        self._current[program] = len(self.segments)
        self.segments.append(Segment(program, before.number + 1, seen))

    def _shared(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return the addresses that one program writes and another accesses, and their segments and kinds."""
        count = [len(addresses) for addresses, _, _ in self._accesses]
        addresses = np.concatenate([addresses for addresses, _, _ in self._accesses])
        segments = np.repeat([segment for _, segment, _ in self._accesses], count)
        kinds = np.repeat([kind for _, _, kind in self._accesses], count)
        written = np.isin(addresses, np.unique(addresses[kinds != READ]))
        rows = np.unique(np.stack([addresses, segments, kinds], 1)[written].astype(np.uint64), axis=0)
        starts = np.flatnonzero(np.diff(rows[:, 0], prepend=np.uint64(0)))
        groups = np.split(rows, starts[1:]) if len(rows) else []
        programs = np.array([segment.program for segment in self.segments])
        shared = [group for group in groups if len(np.unique(programs[group[:, 1].astype(np.int64)])) > 1]
        return np.array([group[0, 0] for group in shared]), [group[:, 1:].astype(np.int64) for group in shared]

    def races(self) -> dict[str, int]:
        """Return what two programs do without an order -> an address at which they do it."""
        found: dict[str, int] = {}
        if not self._accesses:
            return found

        @functools.cache
        def race(first: tuple[int, int], second: tuple[int, int]) -> str | None:
            (a, kind_a), (b, kind_b) = first, second
            left, right = self.segments[a], self.segments[b]
            if (kind_a == kind_b and kind_a != WRITE) or left.follows(right) or right.follows(left):
                return None
            return f"program {left.program} {NAMES[kind_a]} what program {right.program} {NAMES[kind_b]}"

        for address, group in zip(*self._shared()):
            accesses = [tuple(row) for row in group.tolist()]
            for i, first in enumerate(accesses):
                for second in accesses[i + 1 :]:
                    if what := race(first, second):
                        found.setdefault(what, int(address))
        return found


# Names of all kernels that have been launched in this process, without races.
checked: set[str] = set()


def _owner(address: int, tensors: dict[str, torch.Tensor]) -> str:
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        if storage.data_ptr() <= address < storage.data_ptr() + storage.nbytes():
            return name
    return "memory of no argument"


@functools.cache
def install() -> None:
    """Make the interpreter fail on races, and run the programs of a launch in a random order."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    launches: list[Launch] = []
    call, set_grid_idx = GridExecutor.__call__, InterpreterBuilder.set_grid_idx
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    rmw, cas = InterpreterBuilder.create_atomic_rmw, InterpreterBuilder.create_atomic_cas

    def program(builder) -> int:
        return int(np.ravel_multi_index(builder.grid_idx, builder.grid_dim))

    def shuffled(self, *index):
        count = math.prod(self.grid_dim)
        order = np.random.default_rng(count).permutation(count)
        there = order[np.ravel_multi_index(index, self.grid_dim)]
        set_grid_idx(self, *map(int, np.unravel_index(there, self.grid_dim)))

    def loaded(self, pointers, mask, *others):
        launches[-1].access(program(self), pointers.data, mask.data, READ)
        return load(self, pointers, mask, *others)

    def stored(self, pointers, value, mask, *others):
        launches[-1].access(program(self), pointers.data, mask.data, WRITE)
        return store(self, pointers, value, mask, *others)

    def orders(sem, scope) -> tuple[bool, bool]:
        whole = scope.name != "CTA"
        return whole and sem.name in ACQUIRES, whole and sem.name in RELEASES

    def changed(self, operation, pointers, value, mask, sem, scope):
        launches[-1].atomic(program(self), pointers.data, mask.data, *orders(sem, scope))
        return rmw(self, operation, pointers, value, mask, sem, scope)

    def swapped(self, pointers, expected, value, sem, scope):
        launches[-1].atomic(program(self), pointers.data, np.ones(1, bool), *orders(sem, scope))
        return cas(self, pointers, expected, value, sem, scope)

    def launched(self, *args, **options):
        launches.append(Launch())
        try:
            result = call(self, *args, **options)
            races, name = launches[-1].races(), self.fn.__name__
        finally:
            launches.pop()
        values = {**dict(zip(self.arg_names, args)), **options}
        tensors = {key: value for key, value in values.items() if isinstance(value, torch.Tensor)}
        lines = [f"{what}: {_owner(address, tensors)}" for what, address in races.items()]
        assert not lines, f"{name}: {'; '.join(lines[:3])}"
        checked.add(name)
        return result

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = loaded, stored
    InterpreterBuilder.create_atomic_rmw, InterpreterBuilder.create_atomic_cas = changed, swapped
    InterpreterBuilder.set_grid_idx, GridExecutor.__call__ = shuffled, launched
