"""Importing needs torch alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.imports import python

import starflow_kernels

PACKAGE = Path(starflow_kernels.__file__).parent

STRICT = """
import torch
before = set(sys.modules)
import starflow_kernels
import starflow_kernels.adapters.distributions
extra = {name.partition(".")[0] for name in set(sys.modules) - before} - allowed
assert not extra, extra
assert not refused & set(sys.modules), refused & set(sys.modules)
for name in ("triton", "flash_attn", "safetensors", "diffusers", "yaml", "starflow"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(f"{name} was not refused")
z, logdet = starflow_kernels.affine_flow(torch.ones(1, 2, 3), torch.zeros(1, 2, 6))
assert torch.equal(z, torch.ones(1, 2, 3)) and logdet.item() == 0
for library in ("zuko", "nflows", "normflows", "pyro", "sbi"):
    try:
        __import__(f"starflow_kernels.adapters.{library}")
    except ModuleNotFoundError as error:
        assert str(error) == f"No module named '{library}'", error
        continue
    raise AssertionError(f"{library} was not refused")
print("imported", starflow_kernels.__file__)
"""


def test_importing_needs_torch_alone():
    """Run a process that can import the standard library, torch, its requirements and numpy alone."""
    process = python(STRICT, distributions=["torch", "numpy"], modules=["starflow_kernels"])
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == ["imported", str(PACKAGE / "__init__.py")]


WITHOUT_TRITON = """
import sys
import torch
assert "triton" not in sys.modules
torch.cuda.device_count = lambda: GPUS
from starflow_kernels import affine_flow, backends, causal_attention, flow_head, warmup
x, q = torch.ones(1, 2, 3, requires_grad=True), torch.ones(1, 2, 1, 4, requires_grad=True)
for attempt in (None, "triton"):
    calls = (
        lambda: affine_flow(x, torch.zeros(1, 2, 6), backend=attempt),
        lambda: flow_head(x, torch.zeros(1, 2, 4), torch.zeros(6, 4), backend=attempt),
    )
    for call in calls:
        try:
            sum(output.sum() for output in call()).backward()
            assert attempt is None
        except ValueError as error:
            assert attempt and "backend='triton' cannot run" in str(error) and REASON in str(error), error
causal_attention(q, q, q).sum().backward()
print(backends()["affine_flow"]["triton"])
if not GPUS:
    try:
        warmup(affine_flow, x.detach(), torch.zeros(1, 2, 6))
        raise AssertionError
    except ValueError as error:
        assert str(error) == f"no Triton kernels to compile: {backends()['affine_flow']['triton']}", error
assert "triton" not in sys.modules
"""


@pytest.mark.parametrize(
    "gpus, reason, listed",
    [(0, "torch sees no GPU", "torch sees no GPU, and TRITON_INTERPRET is not 1"), (1, "not on cpu", "available")],
)
def test_calls_on_the_cpu_never_import_triton(gpus, reason, listed, tmp_path):
    """A package named triton is installed; torch sees a GPU, or none."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{PACKAGE.parent}"}
    environment.pop("TRITON_INTERPRET", None)
    code = f"GPUS, REASON = {gpus}, {reason!r}\n{WITHOUT_TRITON}"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == listed
