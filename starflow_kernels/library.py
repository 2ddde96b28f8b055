"""Registration with torch.library: one schema an op, a fake, autograd, and dispatch to the backends."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import dispatch

_library = torch.library.Library("starflow", "DEF")


def define(op: str, arguments: str, returns: str, *, fake: Callable, reference: Callable) -> None:
    """Register `starflow::op(arguments, *, str? backend=None) -> returns` with its reference backend.

    fake and reference take the op's arguments without `backend`. Every output is contiguous.
    """
    _library.define(f"{op}({arguments}, *, str? backend=None) -> {returns}")
    dispatch.register(op, "reference", reference)

    _library.impl(op, lambda *args, backend=None: _run(op, backend, *args), "CompositeExplicitAutograd")
    torch.library.register_fake(f"starflow::{op}", lambda *args, backend=None: fake(*args), lib=_library)


def _run(op: str, backend: str | None, *args):
    result = dispatch.run(op, backend, *args)
    if isinstance(result, torch.Tensor):
        return result.contiguous()
    return result if result is None else type(result)(tensor.contiguous() for tensor in result)


def _at_once(args: tuple) -> bool:
    """Whether nothing but a backend would look at the op: no gradient, compiler, mode, transform or subclass."""
    flat = (t for a in args for t in (a if isinstance(a, (list, tuple)) else (a,)))
    tensors = [t for t in flat if isinstance(t, torch.Tensor)]
    return (
        all(t.is_cpu and type(t) in (torch.Tensor, torch.nn.Parameter) for t in tensors)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and not torch.compiler.is_compiling()
        and not is_in_torch_dispatch_mode()
        and torch._C._functorch.maybe_current_level() is None
    )


def call(op: str, *args, backend: str | None):
    """torch.ops.starflow.op, or its backend at once where that is the same: torch takes most of a short call's time."""
    return _run(op, backend, *args) if _at_once(args) else getattr(torch.ops.starflow, op)(*args, backend=backend)


def differentiable(op: str, arguments: str, inputs: int, reference: Callable) -> None:
    """Give `op` a gradient with respect to its first `inputs` arguments, tensors or None.

    Registers `starflow::op_backward(grads, outputs, arguments)`, which returns a list of one gradient for each of those
    arguments that is there; grads is None for an output that was not used. `reference` gets zeros there.
    """
    backward = f"{op}_backward"

    def reference_with_zeros(grads, outputs, *args):
        return reference([torch.zeros_like(o) if g is None else g for g, o in zip(grads, outputs)], outputs, *args)

    define(
        backward,
        f"Tensor?[] grads, Tensor[] outputs, {arguments}",
        "Tensor[]",
        fake=lambda grads, outputs, *args: [a.new_empty(a.shape) for a in args[:inputs] if a is not None],
        reference=reference_with_zeros,
    )

    def setup_context(ctx, inputs, keyword_only_inputs, output):
        ctx.set_materialize_grads(False)
        ctx.backend = keyword_only_inputs["backend"]
        ctx.outputs = len(output)
        ctx.constants = [None if isinstance(a, torch.Tensor) else (a,) for a in inputs]
        ctx.save_for_backward(*output, *(a for a in inputs if isinstance(a, torch.Tensor)))

    def run_backward(ctx, *grads):
        saved = list(ctx.saved_tensors)
        outputs, tensors = saved[: ctx.outputs], iter(saved[ctx.outputs :])
        args = [next(tensors) if constant is None else constant[0] for constant in ctx.constants]
        found = iter(call(backward, list(grads), outputs, *args, backend=ctx.backend))
        return tuple(next(found) if i < inputs and a is not None else None for i, a in enumerate(args))

    def no_second_derivative(ctx, *grads):
        raise NotImplementedError(f"starflow::{op} has no second derivative; its reference.py does, by autograd")

    torch.library.register_autograd(f"starflow::{op}", run_backward, setup_context=setup_context, lib=_library)
    torch.library.register_autograd(f"starflow::{backward}", no_second_derivative, lib=_library)
