"""Registration of ops with torch.library: schema, fake implementation, derivatives, and dispatch to the backends.

Kernels compute an op and its gradient. Any other derivative, and vmap, is plain PyTorch: under a transform of
torch.func, or with a dual number, the reference of the op runs, and torch transforms each of its steps.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType

import torch

from . import dispatch
from .torch_private import (
    below_autograd,
    has_tangent,
    is_asked_for,
    is_batched,
    is_in_transform,
    is_intercepted,
    is_transformed,
    outside_transforms,
)

PLAIN_TYPES = frozenset((torch.Tensor, torch.nn.Parameter))
is_on_cpu = operator.attrgetter("is_cpu")
_library = torch.library.Library("starflow", "DEF")
_gradients: dict[str, Callable] = {}
_instead: dict[str, str] = {}


def define(op: str, arguments: str, returns: str, *, fake: Callable, reference: Callable, instead: str = "") -> None:
    """Register `starflow::op(arguments, *, str? backend=None) -> returns` with its reference backend.

    `fake` and `reference` take the op's arguments without `backend`. Every output of the op is contiguous.

    Args:
        op: name of the op.
        arguments: arguments of its schema.
        returns: results of its schema.
        fake: returns results without values.
        reference: the op in plain PyTorch.
        instead: if torch cannot differentiate and vmap the reference, what the caller can do instead.
    """
    _library.define(f"{op}({arguments}, *, str? backend=None) -> {returns}")
    dispatch.register(op, "reference", reference)
    if instead:
        _instead[op] = instead

    _library.impl(op, lambda *args, backend=None: _run(op, backend, *args), "CompositeExplicitAutograd")
    _library.impl(op, lambda *args, backend=None: _differentiated(op, backend, args), "Autograd")
    _library.impl(op, lambda *args, backend=None: _transformed(op, backend, args), "FuncTorchDynamicLayerFrontMode")
    torch.library.register_fake(f"starflow::{op}", lambda *args, backend=None: fake(*args), lib=_library)


def _run(op: str, backend: str | None, *args):
    result = dispatch.run(op, backend, *args)
    if isinstance(result, torch.Tensor):
        return result.contiguous()
    return result if result is None else type(result)(tensor.contiguous() for tensor in result)


def _dispatch(op: str, backend: str | None, *args):
    return getattr(torch.ops.starflow, op)(*args, backend=backend)


def _below_autograd(op: str, backend: str | None, *args):
    with below_autograd():
        return _dispatch(op, backend, *args)


def _differentiated(op: str, backend: str | None, args: tuple):
    tensors = _tensors(args)
    if any(map(has_tangent, tensors)):
        return _by_reference(op, backend, *args)
    return _with_gradient(_below_autograd, op, backend, args, tensors)


def _with_gradient(run: Callable, op: str, backend: str | None, args: tuple, tensors: list[torch.Tensor]):
    """Return run(op, backend, *args), with a gradient if one of `tensors`, the tensors of `args`, needs it."""
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return run(op, backend, *args)
    return _gradients[op](run, backend, *args) if op in _gradients else _by_reference(op, backend, *args)


def _transformed(op: str, backend: str | None, args: tuple):
    if any(map(is_transformed, _tensors(args))):
        return _by_reference(op, backend, *args)
    with outside_transforms():
        return _dispatch(op, backend, *args)


def _by_reference(op: str, backend: str | None, *args):
    if op in _instead:
        raise _refusal(op, _instead[op])
    if backend not in (None, "reference"):
        raise ValueError(f"backend={backend!r} cannot run {op}: this derivative or transform needs the reference")
    return _run(op, "reference", *args)


def refuse_transforms(op: str, instead: str, *args) -> None:
    """Raise NotImplementedError if a tensor is a dual number or belongs to a transform of torch.func.

    For functions that read values of their tensors. `instead`: see `define`.
    """
    if is_in_transform() and any(is_transformed(t) or has_tangent(t) for t in _tensors(args)):
        raise _refusal(op, instead)


def _refusal(op: str, instead: str) -> NotImplementedError:
    where = "call it under torch.no_grad() and outside of torch.func"
    return NotImplementedError(f"{op} has no derivative of this kind: {where}, or {instead}")


def _tensors(args: tuple) -> list[torch.Tensor]:
    found = []
    for a in args:
        if isinstance(a, torch.Tensor):
            found.append(a)
        elif isinstance(a, (list, tuple)):
            found.extend(t for t in a if isinstance(t, torch.Tensor))
    return found


def _with_tensors(args: Iterable, tensors: Iterator) -> list:
    """Return the arguments with each tensor, or its placeholder `...`, replaced by the next of `tensors`."""
    return [
        _with_tensors(a, tensors)
        if isinstance(a, (list, tuple))
        else next(tensors)
        if a is ... or isinstance(a, torch.Tensor)
        else a
        for a in args
    ]


def call(op: str, *args, backend: str | None):
    """Call torch.ops.starflow.<op>, without torch's dispatcher if it would do nothing: it dominates short calls."""
    if is_intercepted():
        return _dispatch(op, backend, *args)
    tensors = _tensors(args)
    if not are_plain(tensors):
        return _dispatch(op, backend, *args)
    return _with_gradient(_run, op, backend, args, tensors)


def are_plain(tensors: list[torch.Tensor]) -> bool:
    """Return whether torch's dispatcher does nothing for these tensors but to choose the CPU."""
    plain = PLAIN_TYPES.issuperset(map(type, tensors)) and all(map(is_on_cpu, tensors))
    # torch may mark values as negated, without changing them; its dispatcher then does so.
    return plain and not any(map(torch.Tensor.is_neg, tensors))


def differentiable(
    op: str,
    arguments: str,
    inputs: int,
    reference: Callable,
    keep_outputs: bool = True,
    shared: Mapping[int, int] = MappingProxyType({}),
    of_first: Callable | None = None,
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
        of_first: of_first(grad, *other arguments, backend) returns the gradient of the first argument without reading
            it, for ops of one output. It is used where no other gradient is asked for. If no other argument has one,
            the first argument is not saved.
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

    def forward(ctx, run, backend, *args):
        output = run(op, backend, *args)
        ctx.set_materialize_grads(False)
        ctx.backend = backend
        kept = output if keep_outputs else ()
        ctx.outputs = len(kept)
        ctx.dtypes = {i: args[i].dtype for i in shared if args[i] is not None}
        args = [None if i in shared else a for i, a in enumerate(args)]
        ctx.args = [... if isinstance(a, torch.Tensor) else a for a in args]
        ctx.save_for_backward(*kept, *(a for a in args if isinstance(a, torch.Tensor)))
        return output

    def run_backward(ctx, *grads):
        saved = list(ctx.saved_tensors)
        outputs, tensors = saved[: ctx.outputs], iter(saved[ctx.outputs :])
        args = [next(tensors) if a is ... else a for a in ctx.args]
        if all(grad is None for grad in grads):
            return (None,) * len(args)
        if any(grad is not None and is_batched(grad) for grad in grads):
            raise NotImplementedError(
                f"{op} has no batched gradients (is_grads_batched, vectorize): use torch.func.jacrev"
            )
        if of_first is not None and not any(is_asked_for(node) for node, _ in ctx.next_functions[1:]):
            return of_first(*grads, *args[1:], ctx.backend), *(None for _ in args[1:])
        computed = iter(call(backward, list(grads), outputs, *args, backend=ctx.backend))
        gradients = [next(computed) if i < inputs and a is not None else None for i, a in enumerate(args)]
        for i, dtype in ctx.dtypes.items():
            gradients[i] = gradients[shared[i]].to(dtype)
        return tuple(gradients)

    members = {"forward": forward, "backward": lambda ctx, *grads: (None, None, *run_backward(ctx, *grads))}
    members = {name: staticmethod(member) for name, member in members.items()}
    of_all = type(op, (torch.autograd.Function,), members).apply

    def with_gradient(run, backend, first, *others):
        if of_first is None or any(t.requires_grad for t in _tensors(others)):
            return of_all(run, backend, first, *others)
        return _OfFirst.apply(of_first, run, op, backend, first, *others)

    _gradients[op] = with_gradient
    _gradients[backward] = lambda run, backend, *args: list(
        _Backward.apply(run, backward, backend, args, *_tensors(args))
    )


class _OfFirst(torch.autograd.Function):
    """Run an op of which only the first argument needs a gradient."""

    @staticmethod
    def forward(ctx, of_first, run, op, backend, first, *others):
        ctx.of_first, ctx.backend = of_first, backend
        ctx.others = _with_tensors(others, itertools.repeat(...))
        ctx.save_for_backward(*_tensors(others))
        return run(op, backend, first, *others)

    @staticmethod
    def backward(ctx, grad):
        others = _with_tensors(ctx.others, iter(ctx.saved_tensors))
        return None, None, None, None, ctx.of_first(grad, *others, ctx.backend), *(None for _ in others)


class _Backward(torch.autograd.Function):
    """Run a backward op; its own gradient is computed by its reference."""

    @staticmethod
    def forward(ctx, run, op, backend, args, *tensors):
        ctx.op, ctx.args = op, _with_tensors(args, itertools.repeat(...))
        ctx.save_for_backward(*tensors)
        return tuple(run(op, backend, *args))

    @staticmethod
    def backward(ctx, *grads):
        def reference(*tensors):
            return tuple(_run(ctx.op, "reference", *_with_tensors(ctx.args, iter(tensors))))

        _, pull = torch.func.vjp(reference, *ctx.saved_tensors)
        return None, None, None, None, *pull(grads)
