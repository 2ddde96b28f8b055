"""Functions `accelerate` and `restore`."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from torch import nn

from ..spec import check_not_negative
from . import nflows, normflows, pyro, upstream, zuko
from .swap import Accelerated, fast_class, original_class, seen_as

LIBRARIES = (upstream, zuko, nflows, normflows, pyro)


@dataclasses.dataclass(frozen=True)
class Part:
    """A module that `accelerate` knows.

    Attributes:
        name: its name in the model, "" for the model itself.
        kind: its class.
        method: what replaced its slow method, None if it was left alone.
        reason: why it was left alone, "" if it was not.
    """

    name: str
    kind: str
    method: str | None
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Acceleration:
    """Report of `accelerate`, printed as a table.

    Attributes:
        parts: modules that `accelerate` knows, in the order of `model.modules()`.
    """

    parts: tuple[Part, ...]

    @property
    def accelerated(self) -> tuple[Part, ...]:
        """Parts that are fast now."""
        return tuple(part for part in self.parts if part.method)

    def __str__(self) -> str:
        if not self.parts:
            return "accelerate knows no module of this model"
        rows = [(p.name or "(model)", p.kind, p.method or f"left alone: {p.reason}") for p in self.parts]
        widths = [max(map(len, column)) for column in zip(*rows)]
        return "\n".join(f"{name:{widths[0]}}  {kind:{widths[1]}}  {text}" for name, kind, text in rows)


def accelerate(model: nn.Module, *, tol: float | None = None) -> Acceleration:
    """Make the slow methods of the known modules in a model fast, in place. The results stay the same.

    The classes of the modules are exchanged. Weights are neither copied nor changed: training, saving, copying and
    moving the model work as before, and the fast methods use the weights as they are when they are called. Before an
    exchange, the fast method is compared with the original one on random inputs.

    Args:
        model: a model with modules of zuko, nflows, normflows or Pyro, or with flow blocks structured as in
            apple/ml-tarflow, apple/ml-starflow or apple/ml-itarflow.
        tol: iterations end when no value v of a sample changes by more than tol |v|, or by tol times the
            largest value of the sample, at most 1. The default is the rounding error.

    Returns:
        What was done to each known module.
    """
    tol = None if tol is None else check_not_negative("tol", tol)
    _check_module(model)
    found = [candidate for library in LIBRARIES for candidate in library.candidates(model)]
    places = {id(module): place for place, module in enumerate(model.modules())}
    found.sort(key=lambda candidate: places[id(candidate[1])])
    # The checks need gradients, and tensors that are made in inference mode have none.
    with torch.inference_mode(False):
        parts = tuple(_exchange(name, module, fast, tol) for name, module, fast in found)
    known = {id(module) for _, module, _ in found}
    for module in model.modules():
        if id(module) not in known:
            _restore(module)
    return Acceleration(parts)


def restore(model: nn.Module) -> None:
    """Give the modules of a model their original classes back.

    Args:
        model: a model, accelerated or not.
    """
    _check_module(model)
    for module in model.modules():
        _restore(module)


def _check_module(model: nn.Module) -> None:
    """Raise TypeError if a model is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def _restore(module: nn.Module) -> None:
    if isinstance(module, Accelerated):
        module.__class__ = original_class(module)


def _exchange(name: str, module: nn.Module, fast: type[Accelerated] | str, tol: float | None) -> Part:
    original: Any = original_class(module)
    reason = fast if isinstance(fast, str) else None
    # Whatever a module of another library raises, the module stays as it is.
    try:
        if not isinstance(fast, str):
            cls = fast_class(fast, original, tol)
            # A module that is fast already stays so for calls in other threads.
            reason = cls.check(seen_as(original, module))
            if reason is None:
                module.__class__ = cls
                return Part(name, original.__name__, cast(Any, module).description)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    _restore(module)
    return Part(name, original.__name__, None, cast(str, reason))
