"""Every private symbol of torch that this package uses, checked with torch 2.13.0."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

Function = TypeVar("Function", bound=Callable)

__all__ = [
    "apply_outside_transforms",
    "below_autograd",
    "constant_in_graphs",
    "cudnn_attention",
    "cudnn_attention_backward",
    "disable_autocast",
    "flash_attention_backward_cpu",
    "flash_attention_backward_cuda",
    "flash_attention_cpu",
    "flash_attention_cuda",
    "has_hooks",
    "has_tangent",
    "is_batched",
    "is_in_transform",
    "is_intercepted",
    "is_transformed",
    "outside_graphs",
    "outside_transforms",
]

below_autograd = torch._C._AutoDispatchBelowAutograd
"""Context manager in which the dispatcher skips the kernels of autograd."""

outside_transforms = torch._C._DisableFuncTorch
"""Context manager in which the transforms of torch.func do not act."""

is_batched = torch._C._functorch.is_legacy_batchedtensor
"""Return whether a gradient is batched by torch.autograd.grad(is_grads_batched=True)."""

is_transformed = torch._C._functorch.is_functorch_wrapped_tensor
"""Return whether a tensor belongs to a transform of torch.func."""

disable_autocast = torch._C._DisableAutocast
"""Context manager that turns off autocast; it is cheaper than torch.autocast(enabled=False)."""

flash_attention_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_attention_backward_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
flash_attention_cuda = torch.ops.aten._flash_attention_forward
flash_attention_backward_cuda = torch.ops.aten._flash_attention_backward
cudnn_attention = torch.ops.aten._scaled_dot_product_cudnn_attention
cudnn_attention_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward


def apply_outside_transforms(function: type[torch.autograd.Function], *args):
    """Apply a function with no transform of torch.func active; torch's own `apply` searches all arguments for one."""
    return super(torch.autograd.Function, function).apply(*args)


def is_in_transform() -> bool:
    """Return whether a transform of torch.func or a level of dual numbers is active; False while compiling."""
    return not torch.compiler.is_compiling() and _in_transform()


def _in_transform() -> bool:
    return forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None


def version(tensor: torch.Tensor) -> int:
    """Return the number of in-place changes of a tensor, 0 if torch does not count them."""
    return 0 if tensor.is_inference() else tensor._version


def has_hooks(module: torch.nn.Module) -> bool:
    """Return whether a call of a module or of a part of it does more than its forward method."""
    calls = torch.nn.modules.module
    if calls._global_forward_hooks or calls._global_forward_pre_hooks:
        return True
    own = ((vars(part), part._forward_hooks, part._forward_pre_hooks) for part in module.modules())
    return any("forward" in attributes or hooks or pre_hooks for attributes, hooks, pre_hooks in own)


def has_tangent(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is a dual number."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def is_asked_for(node: torch.autograd.graph.Node | None) -> bool:
    """Return whether the backward pass that runs needs the gradient which goes to a node; None stands for no node."""
    if node is None:
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        # Torch refuses to answer for a leaf whose gradient autograd.grad returns.
        return True


def is_intercepted() -> bool:
    """Return whether a compiler, a tracer, a dispatch mode or a transform intercepts calls of torch.

    New tensors may then be of its own kind.
    """
    traced = torch.compiler.is_compiling() or torch._C._is_tracing()
    return traced or is_in_torch_dispatch_mode() or _in_transform()


def constant_in_graphs(function: Function) -> Function:
    """Let torch.compile call a function once and keep its result, instead of tracing it.

    Decorators of torch.compiler import the compiler, which takes seconds; this one and the next do not.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def outside_graphs(reason: str) -> Callable[[Function], Function]:
    """Let torch.compile call a function between two graphs; with fullgraph=True it raises an error with the reason."""

    def decorate(function):
        disabled = None

        @functools.wraps(function)
        def call(*args, **options):
            nonlocal disabled
            if "torch._dynamo" not in sys.modules:
                return function(*args, **options)
            disabled = disabled or torch.compiler.disable(function, reason=reason)
            return disabled(*args, **options)

        call._torchdynamo_disable, call._torchdynamo_disable_msg = True, reason
        return call

    return decorate
