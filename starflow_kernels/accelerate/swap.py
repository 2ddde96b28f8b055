"""Exchange of the class of a module, which leaves its weights, buffers and attributes where they are."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

# Largest relative difference between the original and the fast method, by the dtype in which they are compared.
AGREEMENT = {torch.float64: 1e-8, torch.float32: 1e-5}


class Accelerated:
    """Base of the fast classes. A fast class overrides the slow methods of the class that it is put in front of.

    Attributes:
        description: what replaces the slow method, for the report.
        original: the class of the module before.
        fast: the fast class alone.
        tol: tolerance that `accelerate` was called with, None for the default.
    """

    description: Any
    original: ClassVar[type]
    fast: ClassVar[type[Accelerated]]
    tol: ClassVar[float | None]

    @classmethod
    def check(cls, module: nn.Module) -> str | None:
        """Return why the module cannot be accelerated, or None. `cls` is the class that the module would get."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: int) -> Any:
        build, arguments, *rest = super().__reduce_ex__(max(2, int(protocol)))  # type: ignore[misc]
        if build.__name__ != "__newobj__":
            return build, arguments, *rest
        return _rebuild, (self.fast, self.original, self.tol, *arguments[1:]), *rest


def _rebuild(fast: type[Accelerated], original: type, tol: float | None, *arguments: Any) -> Any:
    cls = fast_class(fast, original, tol)
    return cls.__new__(cls, *arguments)


def loaded(module: str, name: str) -> Any:
    """Return a class of a library that has been imported, or (), of which nothing is an instance."""
    return getattr(sys.modules.get(module), name, ())


_classes: dict[tuple, type] = {}


def fast_class(fast: type[Accelerated], original: type, tol: float | None) -> Any:
    """Return the class that has the methods of `fast`, and those of `original` for the rest."""
    key = fast, original, tol
    if key not in _classes:
        fields = {"original": original, "fast": fast, "tol": tol, "__module__": original.__module__}

        _classes[key] = type(original)(f"Fast{original.__name__}", (fast, original), fields)
    return _classes[key]


def seen_as(cls: type, module: nn.Module) -> Any:
    """Return a second object of another class on the same weights, buffers and attributes."""
    view = object.__new__(cls)
    vars(view).update(vars(module))
    return view


def original_class(module: nn.Module) -> type:
    """Return the class of a module before it was accelerated."""
    return module.original if isinstance(module, Accelerated) else type(module)


def disagreement(module: nn.Module, compare: Callable[[nn.Module], tuple[torch.Tensor, torch.Tensor]]) -> str | None:
    """Return how far apart two ways of one computation are, or None if they agree.

    The comparison is in float64 on a copy of the module, or in the module's own dtype where it does not compute in
    float64. The module and the random numbers of torch stay untouched.

    Args:
        module: the module.
        compare: compare(module) returns the expected values and those found.
    """
    devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices), torch.no_grad():
        try:
            expected, found = compare(copy.deepcopy(module).eval().double())
        except (RuntimeError, TypeError):
            expected, found = compare(copy.deepcopy(module).eval())
    scale = expected.abs().amax().clamp(min=1)
    error = float(((found - expected).abs() / scale).amax())
    limit = AGREEMENT.get(expected.dtype, AGREEMENT[torch.float32])
    # Not a number is no agreement.
    return None if error <= limit else f"the fast method differs from the original by {error:.1e}"
