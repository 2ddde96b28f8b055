"""Programs of a launch share no memory without an order: TRITON_INTERPRET=1 pytest tests/kernels/test_owners_triton.py.

Every launch of every test in Triton's interpreter is checked; here each kernel is launched once.
"""

from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch
from support import owners
from support.backends import require_interpreter
from support.blocks import BLOCKS, block

import starflow_kernels
from benchmarks.gpu.op_cases import DRY, MAKE
from benchmarks.gpu.op_checks import ours, passes
from starflow_kernels import Solver, block_inverse

require_interpreter()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from starflow_kernels._triton import rotary  # noqa: E402
from starflow_kernels.block.triton import sequential, sizes, step_kernels, sweep_kernels  # noqa: E402


def every_kernel() -> set[str]:
    """Return the names of all kernels of the package."""
    found = set()
    for module in pkgutil.walk_packages(starflow_kernels.__path__, "starflow_kernels."):
        if "triton" in module.name:
            values = vars(importlib.import_module(module.name))
            found |= {name for name, value in values.items() if hasattr(value, "fn") and name.endswith("_kernel")}
    return found


def launch_ops() -> None:
    for name, shapes in DRY.items():
        case = MAKE[name](shapes[0], torch.float32, "cpu")
        passes(ours(case), case.tensors)
    x, angle = torch.randn(2, 5, 2, 6), torch.randn(5, 3)
    rotary.undo_rotary(rotary.apply_rotary(x, angle, angle, "half"), angle, angle, "half")


def launch_blocks(monkeypatch) -> None:
    """Sample from small blocks whose attention has several splits, and whose products have several parts."""
    monkeypatch.setattr(sequential, "kept_sessions", sequential.Sessions())
    for name in ("SPLIT", "BLOCK_S"):
        monkeypatch.setattr(sizes, name, 2)
    shape = {"B": 2, "tokens": 5, "layers": 1, "heads": 1, "kv_heads": 1, "mlp_dim": 130}
    for name in ("starflow-text", "tarflow-swiglu"):
        z, w, spec, context = block(BLOCKS[name], dtype=torch.float32, **shape)
        block_inverse(z, w, spec, **context, backend="triton")
        block_inverse(z, w, spec, **context, solver=Solver("jacobi", 3), backend="triton")
    z, w, spec, context = block(BLOCKS["tarflow"], dtype=torch.float32, **shape)
    block_inverse(z, w, spec, solver=Solver("jacobi", 3, neighbours=(1, 2)), backend="triton")
    block_inverse(z, w, spec, quantize="int8", backend="triton")


def test_no_program_touches_what_another_one_writes(monkeypatch):
    owners.checked.clear()
    launch_ops()
    launch_blocks(monkeypatch)
    assert owners.checked == every_kernel()


@triton.jit
def store_twice_kernel(x):
    tl.store(x + tl.program_id(0) // 2, 1.0)


@triton.jit
def read_neighbour_kernel(x):
    i = tl.program_id(0)
    tl.store(x + i, tl.load(x + i + 1))


@triton.jit
def sum_kernel(x, ticket, SEM: tl.constexpr, SCOPE: tl.constexpr, LAST: tl.constexpr):
    """Store a value per program, and let the last program add them."""
    i, programs = tl.program_id(0), tl.num_programs(0)
    tl.store(x + 1 + i, 1.0)
    if (tl.atomic_add(ticket, 1, sem=SEM, scope=SCOPE) == programs - 1) | (not LAST):
        tl.store(x, tl.sum(tl.load(x + 1 + tl.arange(0, 4))))
        tl.store(ticket, 0)


def test_sees_two_programs_that_write_the_same_address():
    with pytest.raises(AssertionError, match=r"store_twice_kernel: program . writes what program . writes: x"):
        store_twice_kernel[(2,)](torch.zeros(1))


def test_sees_a_program_that_reads_what_another_one_writes():
    with pytest.raises(AssertionError, match=r"read_neighbour_kernel: .* reads .*: x"):
        read_neighbour_kernel[(4,)](torch.zeros(5))


def test_accepts_a_sum_by_the_last_program_to_arrive():
    x, ticket = torch.zeros(5), torch.zeros(1, dtype=torch.int32)
    sum_kernel[(4,)](x, ticket, "acq_rel", "gpu", True)
    assert x[0] == 4 and ticket == 0


@pytest.mark.parametrize(
    "sem, scope, last",
    [("relaxed", "gpu", True), ("acquire", "gpu", True), ("acq_rel", "cta", True), ("acq_rel", "gpu", False)],
)
def test_sees_a_sum_without_order(sem, scope, last):
    with pytest.raises(AssertionError, match="sum_kernel: program"):
        sum_kernel[(4,)](torch.zeros(5), torch.zeros(1, dtype=torch.int32), sem, scope, last)


@triton.jit
def relaxed_arrival(ticket, programs):
    last = tl.atomic_add(ticket, 1, sem="relaxed", scope="gpu") == programs - 1
    if last:
        tl.store(ticket, 0)
    return last


@triton.jit
def first_arrival(ticket, programs):
    first = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == 0
    if first:
        tl.store(ticket, 0)
    return first


@pytest.mark.parametrize("mutant", [relaxed_arrival, first_arrival], ids=lambda mutant: mutant.fn.__name__)
@pytest.mark.parametrize("module", [step_kernels, sweep_kernels], ids=lambda module: module.__name__.split(".")[-1])
def test_sees_mutants_of_the_kernels_of_a_block(module, mutant, monkeypatch):
    monkeypatch.setattr(module, "is_last_arrival", mutant)
    with pytest.raises(AssertionError, match="block_"):
        launch_blocks(monkeypatch)
