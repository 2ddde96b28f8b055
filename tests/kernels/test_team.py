"""Threads that work on one call: they have the same bits however many stay, and callers do not wait for each other."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from support.backends import needs_native
from support.blocks import WIDE_SPECS, every_wide_spec, rows, tame_block

from starflow_kernels import Solver, block_forward, block_inverse
from starflow_kernels._core.quota import granted_cores
from starflow_kernels.block import native

pytestmark = needs_native


@pytest.fixture
def rehearse(monkeypatch):
    """Return the op that makes members leave; small calls have teams, too."""
    monkeypatch.setattr(native, "MEMBER_SECONDS", 1e-12)
    native.plan_sampling.cache_clear()
    yield torch.ops.starflow_native.rehearse
    native.plan_sampling.cache_clear()
    torch.ops.starflow_native.rehearse(0)


def forward(x, w, spec, context):
    return block_forward(x, w, spec, **context, backend="native")[0]


def sequential(x, w, spec, context):
    return block_inverse(x, w, spec, **context, backend="native").x


def jacobi(x, w, spec, context):
    return block_inverse(x, w, spec, **context, backend="native", solver=Solver("jacobi", 5, neighbours=(1,))).x


def gradient(x, w, spec, context):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(sequential(x, w, spec, context).square().sum(), x)[0]


@every_wide_spec
@pytest.mark.parametrize("run", [forward, sequential, jacobi, gradient])
@pytest.mark.parametrize("batch", [1, 3])
def test_members_that_leave_change_no_bit(run, spec, batch, rehearse):
    x, w, context = tame_block(spec, batch, 40, 3)
    expected = run(x, w, spec, context)
    torch.set_num_threads(5)
    for seed in range(8):
        rehearse(seed)
        assert torch.equal(run(x, w, spec, context), expected), seed


def test_members_leave_where_the_rehearsal_says_so(rehearse):
    x, w, context = tame_block(WIDE_SPECS["tarflow"], 1, 40)
    torch.set_num_threads(5)
    rehearse(0)
    sequential(x, w, WIDE_SPECS["tarflow"], context)
    assert rehearse(1) == 0
    sequential(x, w, WIDE_SPECS["tarflow"], context)
    assert rehearse(0) == 4


def test_a_caller_does_not_wait_for_another(rehearse, monkeypatch):
    """While one thread runs a long call of the op, another one ends many short ones."""
    monkeypatch.setattr(native, "CALL_SECONDS", 1e6)
    spec = WIDE_SPECS["tarflow"]
    x, w, context = tame_block(spec, 512, 290)
    short = x[:1, :2], w, spec, rows(context, slice(0, 1))
    expected = forward(*short)
    torch.set_num_threads(2)
    long = threading.Thread(target=forward, args=(x, w, spec, context))
    long.start()
    ended = 0
    while long.is_alive():
        assert torch.equal(forward(*short), expected)
        ended += long.is_alive()
    assert ended > 5


SCRIPT = """
import os
import torch
from starflow_kernels import BlockSpec, block_inverse
torch.set_num_threads(2)
spec = BlockSpec(token_dim=8, channels=64, layers=2, heads=1, head_dim=64, kv_heads=1, mlp_dim=256)
weights = {n: torch.randn(s) / 100 for n, s in spec.weight_shapes.items()}
z = torch.randn(8, 64, 8)
run = lambda: block_inverse(z, weights, spec, backend="native").x
"""


def run_script(code: str) -> str:
    """Return the output of a script in a process of its own, which must end within a minute."""
    command = [sys.executable, "-c", SCRIPT + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def test_a_forked_process_does_not_wait_for_the_threads_of_its_parent():
    code = """
import starflow_kernels
starflow_kernels.backends()
torch.ops.starflow_native.rehearse(0)
expected = run()
child = os.fork()
if not child:
    os._exit(0 if torch.equal(run(), expected) else 3)
print(os.waitpid(child, 0)[1])
"""
    assert run_script(code) == "0\n"


@pytest.mark.parametrize("limit", ["os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])", "limit_cores(1)"])
def test_with_one_core_no_thread_is_started(limit):
    code = f"""
import starflow_kernels
starflow_kernels.backends()
limit_cores = torch.ops.starflow_native.limit_cores
{limit}
before = len(os.listdir("/proc/self/task"))
run()
print(len(os.listdir("/proc/self/task")) - before)
"""
    assert run_script(code) == "0\n"


def control_groups(folder: Path, lines: str, **quotas: str) -> int | None:
    """Return the granted cores of a process with these groups. quotas: contents of files, "__" in place of "/"."""
    (folder / "cgroup").write_text(lines)
    for name, text in quotas.items():
        file = folder / "mount" / name.replace("__", "/").replace("cpu_max", "cpu.max").replace("cpu_cfs", "cpu.cfs")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return granted_cores(folder / "cgroup", folder / "mount")


def test_the_smallest_quota_of_all_groups_above_counts(tmp_path):
    quotas = {"cpu_max": "max 100000\n", "a__cpu_max": "150000 100000\n", "a__b__cpu_max": "400000 100000\n"}
    assert control_groups(tmp_path, "0::/a/b\n", **quotas) == 2


def test_quotas_of_version_1_are_read(tmp_path):
    quotas = {"cpu__cpu_cfs_quota_us": "50000\n", "cpu__cpu_cfs_period_us": "100000\n"}
    assert control_groups(tmp_path, "4:memory:/m\n3:cpu,cpuacct:/docker/1\n", **quotas) == 1


@pytest.mark.parametrize("quota", ["max 100000\n", "nonsense"])
def test_without_a_quota_no_number_is_set(quota, tmp_path):
    assert control_groups(tmp_path, "0::/\n", cpu_max=quota) is None
    assert granted_cores(tmp_path / "missing", tmp_path) is None
