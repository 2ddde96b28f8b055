"""Inverse of flow blocks, one after the other."""

from __future__ import annotations

import functools
import math
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
from .api import block_inverse, solve_report
from .checks import check_inverse, check_kinds
from .layout import Layout, arrange
from .native import WEIGHT_DTYPES

Block = tuple[Mapping[str, torch.Tensor], BlockSpec, Mapping[str, Any]]
CONTEXT = ("cond", "prefix", "cos", "sin", "guidance")
# Options of `block_inverse` that one call for all blocks takes.
OPTIONS = frozenset((*CONTEXT, "rule", "temperature", "solver", "quantize"))
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
        ValueError: as for `block_inverse`.

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
    return found[::-1]


def _in_one_call(z: torch.Tensor, blocks: Sequence[Block], backend: str | None) -> list[Inverse] | None:
    """Return the results of one native call, or None if these arguments have none."""
    if is_intercepted() or not isinstance(z, torch.Tensor) or z.dtype != torch.float32 or not z.numel():
        return None
    if z.device.type != "cpu" or compiled.native_unavailable():
        return None
    calls = []
    for weights, spec, options in blocks:
        call = _call(z, weights, spec, options)
        if call is None or (backend is None and not calls and not _is_native(z, call)):
            return None
        calls.append(call)
    with torch.no_grad(), disable_autocast():
        check_finite(z=z)
        for call in calls:
            cond, prefix, _, _, guidance = call.context
            check_finite(cond=cond, prefix=prefix, guidance=guidance)
        found = native_stack.stack_inverse(z, calls)
        # Block by block, an error says of which block an input is not finite.
        if found is None or not math.isfinite(sum(x.sum().item() for x in found[0][1:])):
            return None
    shape = z.shape
    return [
        Inverse(x, functools.partial(sum_log_sigma, log_sigma), functools.partial(_report, call.spec, shape, seconds))
        for x, log_sigma, seconds, call in zip(*found, calls)
    ]


def _call(
    z: torch.Tensor, weights: Mapping[str, torch.Tensor], spec: BlockSpec, options: Mapping[str, Any]
) -> native_stack.BlockCall | None:
    """Return the checked arguments of a block, or None if it must run by itself."""
    check_kinds(weights, spec)
    given = {name: value for name, value in options.items() if value is not None or name not in CONTEXT}
    solver = given.get("solver", SEQUENTIAL)
    if not OPTIONS.issuperset(given) or (isinstance(solver, Solver) and solver.method != "sequential"):
        return None
    tensors, guidance = check_inverse(z, weights, spec, **given)
    cond, prefix, cos, sin = (given.get(name) for name in CONTEXT[:4])
    inputs = [z, *tensors, *(t for t in (cond, prefix, cos, sin, guidance) if t is not None)]
    if not are_plain(inputs) or tensors[0].dtype not in WEIGHT_DTYPES or needs_gradient(*inputs):
        return None
    cond = arrange(z, tensors, spec, cond, None, None).cond
    rest = given.get("rule", "tarflow"), given.get("temperature", 1.0), given.get("quantize", "none")
    return native_stack.BlockCall(tensors, (cond, prefix, cos, sin, guidance), spec, *rest)


def _is_native(z: torch.Tensor, call: native_stack.BlockCall) -> bool:
    """Return whether the native backend is the one that `block_inverse` takes."""
    options = call.spec.to_json(), call.rule, call.temperature, call.quantize
    return dispatch.choose("block_inverse", z, call.weights, *call.context, *options) == "native"


def _report(spec: BlockSpec, shape: torch.Size, seconds: float) -> SolveReport:
    B, T, _ = shape
    return solve_report(Layout(spec, [], None, T, T), None, seconds, B)
