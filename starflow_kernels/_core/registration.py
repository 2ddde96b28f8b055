"""Registration of ops with torch.library: schema, fake implementation, gradient, and dispatch to the backends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from . import dispatch
from .torch_private import is_in_torch_dispatch_mode, is_in_transform

_library = torch.library.Library("starflow", "DEF")
_functions: dict[str, type[torch.autograd.Function]] = {}


def define(op: str, arguments: str, returns: str, *, fake: Callable, reference: Callable) -> None:
    """Register `starflow::op(arguments, *, str? backend=None) -> returns` with its reference backend.

    `fake` and `reference` take the op's arguments without `backend`. Every output of the op is contiguous.
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


def _tensors(args: tuple) -> list[torch.Tensor]:
    flat = (t for a in args for t in (a if isinstance(a, (list, tuple)) else (a,)))
    return [t for t in flat if isinstance(t, torch.Tensor)]


def _needs_no_dispatcher(tensors: list[torch.Tensor]) -> bool:
    """Return whether no compiler, dispatch mode, transform or tensor subclass would intercept a call."""
    return (
        all(t.is_cpu and type(t) in (torch.Tensor, torch.nn.Parameter) for t in tensors)
        and not torch.compiler.is_compiling()
        and not is_in_torch_dispatch_mode()
        and not is_in_transform()
    )


def call(op: str, *args, backend: str | None):
    """Call torch.ops.starflow.<op>, without torch's dispatcher if it would do nothing: it dominates short calls."""
    tensors = _tensors(args)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if not _needs_no_dispatcher(tensors) or (needs_grad and op not in _functions):
        return getattr(torch.ops.starflow, op)(*args, backend=backend)
    return _functions[op].apply(backend, *args) if needs_grad else _run(op, backend, *args)


def differentiable(
    op: str,
    arguments: str,
    inputs: int,
    reference: Callable,
    keep_outputs: bool = True,
    shared: Mapping[int, int] = MappingProxyType({}),
) -> None:
    """Give an op a gradient, computed by the op `starflow::<op>_backward(grads, outputs, arguments)`.

    The backward op returns a list with one gradient for each differentiable argument that is not None. `grads` has an
    entry per output of the op: its gradient, or None if the output was not used. Such an output contributes nothing,
    even if it is infinite.

    Args:
        op: name of an op registered by `define`.
        arguments: the arguments of the schema of `op`.
        inputs: number of leading arguments that are differentiable, each a tensor or None.
        reference: the backward op in plain PyTorch.
        keep_outputs: whether backward needs the outputs. With False, `outputs` is empty; the op must have one output.
        shared: maps an argument to another one with the same gradient, such as the terms of a sum. The first one is not
            saved: backward gets None in its place and returns no gradient for it.
    """
    backward = f"{op}_backward"

    define(
        backward,
        f"Tensor?[] grads, Tensor[] outputs, {arguments}",
        "Tensor[]",
        fake=lambda grads, outputs, *args: [
            a.new_empty(a.shape) for i, a in enumerate(args[:inputs]) if a is not None and i not in shared
        ],
        reference=reference,
    )

    def setup_context(ctx, inputs, keyword_only_inputs, output):
        ctx.set_materialize_grads(False)
        ctx.backend = keyword_only_inputs["backend"]
        kept = output if keep_outputs else ()
        ctx.outputs = len(kept)
        ctx.dtypes = {i: inputs[i].dtype for i in shared if inputs[i] is not None}
        inputs = [None if i in shared else a for i, a in enumerate(inputs)]
        ctx.constants = [None if isinstance(a, torch.Tensor) else (a,) for a in inputs]
        ctx.save_for_backward(*kept, *(a for a in inputs if isinstance(a, torch.Tensor)))

    def run_backward(ctx, *grads):
        saved = list(ctx.saved_tensors)
        outputs, tensors = saved[: ctx.outputs], iter(saved[ctx.outputs :])
        args = [next(tensors) if constant is None else constant[0] for constant in ctx.constants]
        if all(grad is None for grad in grads):
            return (None,) * len(args)
        computed = iter(call(backward, list(grads), outputs, *args, backend=ctx.backend))
        gradients = [next(computed) if i < inputs and a is not None else None for i, a in enumerate(args)]
        for i, dtype in ctx.dtypes.items():
            gradients[i] = gradients[shared[i]].to(dtype)
        return tuple(gradients)

    def no_second_derivative(ctx, *grads):
        raise NotImplementedError(f"starflow::{op} has no second derivative; its reference.py does, by autograd")

    def forward(ctx, backend, *args):
        outputs = _run(op, backend, *args)
        setup_context(ctx, args, {"backend": backend}, outputs)
        return outputs

    members = {"forward": forward, "backward": lambda ctx, *grads: (None, *run_backward(ctx, *grads))}
    members = {name: staticmethod(member) for name, member in members.items()}
    _functions[op] = type(op, (torch.autograd.Function,), members)
    torch.library.register_autograd(f"starflow::{op}", run_backward, setup_context=setup_context, lib=_library)
    torch.library.register_autograd(f"starflow::{backward}", no_second_derivative, lib=_library)
