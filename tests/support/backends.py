"""Backends of the ops on this machine."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from starflow_kernels import backends
from starflow_kernels._core import compiled
from starflow_kernels._triton import runtime

from . import chip_arithmetic, owners

GPU = ("cuda", "cudnn", "flash", "persistent", "triton")
# Ops that are composed of others only on a GPU.
COMPOSED_ON_GPU = ("block_forward", "block_params")
if runtime.interpreted() and runtime.unavailable() is None:
    chip_arithmetic.install()
    owners.install()
needs_native = pytest.mark.skipif(compiled.native_unavailable() is not None, reason=str(compiled.native_unavailable()))


def cpu_backends(op: str, takes: Callable[..., bool] = lambda backend, **call: True) -> list:
    """Return the backends of an op for tensors on the CPU as parameters of a test, without those that refuse the call.

    A backend that this machine lacks is skipped with the reason. Of the ops with a Triton backend, attention_flow is
    the only one whose tests run in Triton's interpreter too; the others have files of their own.
    """
    found = []
    for name, state in backends()[op].items():
        interpreted = name == "triton" and op == "attention_flow" and runtime.interpreted()
        on_gpu = name in GPU or (name == "composed" and op in COMPOSED_ON_GPU)
        if (on_gpu and not interpreted) or not takes(name):
            continue
        if name == "composed":  # it is made of native kernels
            state = compiled.native_unavailable() or state
        mark = pytest.mark.skipif(not state.startswith("available"), reason=state)
        found.append(pytest.param(name, marks=mark))
    return found


def on_backends(op: str, takes: Callable[..., bool] = lambda backend, **call: True, **values) -> pytest.MarkDecorator:
    """Parametrize a test by `backend` and `values`, without the calls that a backend refuses.

    Args:
        op: name of the op.
        takes: whether a backend takes a call, from its name and the keywords of `values`.
        values: values of each further parameter.
    """
    rows = [
        pytest.param(*backend.values, *row, marks=backend.marks)
        for backend in cpu_backends(op)
        for row in itertools.product(*values.values())
        if takes(*backend.values, **dict(zip(values, row)))
    ]
    return pytest.mark.parametrize(("backend", *values), rows, ids=str)


def require_interpreter() -> None:
    """Skip the file of the caller unless Triton's interpreter runs its kernels."""
    if not runtime.interpreted() or runtime.unavailable() is not None:
        pytest.skip("it needs TRITON_INTERPRET=1 and triton", allow_module_level=True)
