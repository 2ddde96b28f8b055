"""Methods of a module that run with the hooks of its `forward`.

FSDP, and offloading by accelerate and diffusers, bring weights to their device in hooks of `forward` alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import nn

F = TypeVar("F", bound=Callable[..., Any])


def runs_methods(forward: F) -> F:
    """Let a `forward` run the methods that `with_forward_hooks` decorates."""

    @functools.wraps(forward)
    def run(module: Any, *arguments: Any, method: Callable[..., Any] = forward, **options: Any) -> Any:
        return method(module, *arguments, **options)

    return cast("F", run)


def with_forward_hooks(method: F) -> F:
    """Run a method, or a function of a module, with the hooks of the module's `forward` if any run before it."""

    @functools.wraps(method)
    def run(module: Any, *arguments: Any, **options: Any) -> Any:
        if has_hooks(module):
            return module(*arguments, method=method, **options)
        return method(module, *arguments, **options)

    return cast("F", run)


def has_hooks(module: nn.Module) -> bool:
    """Return whether hooks run before `forward`."""
    # FSDP has such hooks; torch has no public name for them.
    return "forward" in module.__dict__ or bool(module._forward_pre_hooks)  # noqa: SLF001


def has_replaced_forward(module: nn.Module) -> bool:
    """Return whether `forward` was replaced, which is how accelerate and diffusers attach their hooks."""
    return "forward" in vars(module)


def views(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return views of loaded weights; they keep the values when hooks take these out of the parameters again."""
    return {name: weight.view_as(weight) for name, weight in weights.items()}


def execution_device(module: nn.Module) -> torch.device:
    """Return the device of the weights or, while they are offloaded, the one that accelerate brings them to."""
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((torch.device(each) for each in devices if each is not None), device)
