"""Inverse of flow blocks, one after the other."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .._core import compiled, dispatch
from .._core.checks import check_finite
from .._core.dispatch import disable_autocast
from .._core.implicit import needs_gradient
from .._core.registration import are_plain
from .._core.torch_private import is_intercepted
from ..solver import Inverse, Solver, SolveReport, sum_log_sigma
from ..spec import BlockSpec
from . import native_stack
from .api import block_inverse
from .checks import check_context, check_inverse, check_kinds, ordered
from .layout import Layout, arrange
from .reports import solve_report

Block = tuple[Mapping[str, torch.Tensor], BlockSpec, Mapping[str, Any]]
CONTEXT = ("cond", "prefix", "cos", "sin", "guidance")
# Options of `block_inverse` that one call for all blocks takes.
OPTIONS = frozenset((*CONTEXT, "cond_in_order", "rule", "temperature", "solver", "quantize"))
SEQUENTIAL = Solver()


def stack_inverse(z: torch.Tensor, blocks: Sequence[Block], *, backend: str | None = None) -> list[Inverse]:
    """Transform noise to data through several flow blocks, the last one first.

    The results have the bits of `block_inverse`. On the CPU, one native call does all of it if every block is solved
    token by token with no other options than a condition, a prefix, rotary angles, guidance and `quantize`, if no
    gradient is needed, and if it takes less than 0.3 s, so that Python handles Ctrl-C in time. This saves most of the
    time of a small flow with few samples. Everything else runs block by block.

    Args:
        z: (B, T, D) finite noise in the order of the data, float32 or float64.
        blocks: (weights, spec, options) of each block; `options` are further arguments of `block_inverse` by name.
        backend: name of a backend; None takes the first that can run.

    Returns:
        The result of each block, in the order of `blocks`; the data are those of the first one.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: as for `block_inverse`, or the data are not finite.

    Equivalent to:
        ```python
        for weights, spec, options in reversed(blocks):
            z = block_inverse(z, weights, spec, **options).x
        ```
    """
    if not isinstance(blocks, Sequence) or not all(isinstance(b, tuple) and len(b) == 3 for b in blocks) or not blocks:
        raise TypeError("blocks: expected (weights, spec, options) of at least one block")
    for i, (_, _, options) in enumerate(blocks):
        if not isinstance(options, Mapping) or "backend" in options:
            raise TypeError(f"blocks: expected options of block {i} by name, as of block_inverse without backend")
    if backend in (None, "native") and (solved := _in_one_call(z, blocks, backend)):
        return solved
    found: list[Inverse] = []
    for weights, spec, options in reversed(blocks):
        found.append(block_inverse(found[-1].x if found else z, weights, spec, **options, backend=backend))
    if not is_intercepted():
        check_finite(x=found[-1].x.detach())
    return found[::-1]


def _in_one_call(z: torch.Tensor, blocks: Sequence[Block], backend: str | None) -> list[Inverse] | None:
    """Return the results of one native call, or None if these arguments have none."""
    if is_intercepted() or not isinstance(z, torch.Tensor) or z.dtype != torch.float32 or not z.numel():
        return None
    if z.device.type != "cpu" or compiled.native_unavailable():
        return None
    tensors, specs = [], []
    for weights, spec, _ in blocks:
        check_kinds(weights, spec)
        tensors.append(ordered(weights, spec.weight_shapes))
        specs.append(spec)
    if not all(map(are_plain, tensors)) or not (states := native_stack.weight_states(tensors, specs)):
        return None
    calls = []
    for own, state, spec, (_, _, options) in zip(tensors, states, specs, blocks):
        call = _call(z, own, state, spec, options)
        if call is None or (backend is None and not calls and not _is_native(z, call)):
            return None
        calls.append(call)
    with torch.no_grad(), disable_autocast():
        found = native_stack.stack_inverse(z, calls)
    # Block by block, an error says what is not finite.
    if found is None:
        return None
    shape = z.shape
    return [
        Inverse(x, functools.partial(sum_log_sigma, log_sigma), functools.partial(_report, call.spec, shape, seconds))
        for x, log_sigma, seconds, call in zip(*found, calls)
    ]


def _call(
    z: torch.Tensor, weights: list[torch.Tensor], state: int, spec: BlockSpec, options: Mapping[str, Any]
) -> native_stack.BlockCall | None:
    """Return the checked arguments of a block, or None if it must run by itself."""
    given = {name: value for name, value in options.items() if value is not None or name not in CONTEXT}
    solver = given.get("solver", SEQUENTIAL)
    if not OPTIONS.issuperset(given) or (isinstance(solver, Solver) and solver.method != "sequential"):
        return None
    cond, prefix, cos, sin = (given.pop(name, None) for name in CONTEXT[:4])
    in_order = given.pop("cond_in_order", False)
    guidance, rows = check_inverse(z, spec, **given)
    check_context(z, spec, cond, prefix, cos, sin, rows)
    inputs = [z, *(t for t in (cond, prefix, cos, sin, guidance) if t is not None)]
    if not are_plain(inputs) or needs_gradient(*weights, *inputs):
        return None
    cond = arrange(z, weights, spec, cond, None, None, cond_in_order=in_order).cond
    rest = given.get("rule", "tarflow"), given.get("temperature", 1.0), given.get("quantize", "none")
    return native_stack.BlockCall(weights, state, (cond, prefix, cos, sin, guidance), spec, *rest)


def _is_native(z: torch.Tensor, call: native_stack.BlockCall) -> bool:
    """Return whether the native backend is the one that `block_inverse` takes."""
    options = call.spec.to_json(), call.rule, call.temperature, call.quantize
    return dispatch.choose("block_inverse", z, call.weights, *call.context, *options) == "native"


def _report(spec: BlockSpec, shape: torch.Size, seconds: float) -> SolveReport:
    B, T, _ = shape
    return solve_report(Layout(spec, [], None, T, T), None, seconds, B)
