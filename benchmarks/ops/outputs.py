"""What a benchmark of an op runs: the op, or the op and its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def outputs(function: Callable, tensors: Sequence[torch.Tensor], gradient: bool) -> tuple[torch.Tensor, ...]:
    """Return the outputs of a function, or with `gradient` the gradients of their sum.

    Args:
        function: returns a tensor or a tuple of tensors.
        tensors: arguments of the function.
        gradient: whether to run the backward pass, too.
    """
    if not gradient:
        with torch.no_grad():
            return _tuple(function(*tensors))
    tensors = [t.requires_grad_() for t in tensors]
    found = _tuple(function(*tensors))
    return torch.autograd.grad(found, tensors, [torch.ones_like(t) for t in found])


def _tuple(found: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (found,) if isinstance(found, torch.Tensor) else found
