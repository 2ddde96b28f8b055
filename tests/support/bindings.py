"""Calls of compiled ops, made again with one wrong argument."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import torch


class Recorded:
    """Ops of a namespace that keep the last call of each: its name -> (op, arguments).

    Args:
        ops: namespace of torch.ops.
    """

    def __init__(self, ops: object):
        self.ops, self.calls = ops, {}

    def __getattr__(self, name: str) -> Callable:
        op = getattr(self.ops, name).default

        def call(*args):
            self.calls[name] = op, args
            return op(*args)

        call.default = call
        return call


def assert_checked(op: Callable, args: tuple) -> None:
    """Assert that a call is right, and that each call with one wrong argument raises an error of the op's own."""
    op(*args)
    for i, (argument, value) in enumerate(zip(op._schema.arguments, args)):
        for what, other in _wrong(value):
            try:
                op(*args[:i], other, *args[i + 1 :])
            except (RuntimeError, ValueError) as error:
                assert re.search("kernels: |weights: |spec: |lengths do", str(error)), error
            else:
                raise AssertionError(f"{op.name()} takes {argument.name} {what}")


def _wrong(value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, (list, tuple)) and value:
        yield "without its last element", list(value[:-1])
        yield "with an element too many", [*value, value[-1]]
        for i, element in enumerate(value):
            for what, other in _wrong(element):
                yield f"with an element {what}", [*value[:i], other, *value[i + 1 :]]
    if not isinstance(value, torch.Tensor):
        return
    for dim, size in enumerate(value.shape):
        yield f"with half of dimension {dim}", value.narrow(dim, 0, size // 2).contiguous()
    yield "of another dtype", value.to(torch.int16)
    yield "that is not contiguous", torch.stack([value, value], -1)[..., 0]
    yield "of one number", value.flatten()[0]
