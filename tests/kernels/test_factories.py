"""Tensors are made with a dtype and a device, so that the defaults of torch act on new modules alone."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import starflow
import starflow_kernels

FACTORIES = (
    r"torch\.(arange|as_tensor|asarray|empty|empty_strided|eye|full|linspace|logspace|normal|ones|rand|randint|randn|"
    r"randperm|scalar_tensor|tensor|tril_indices|triu_indices|zeros)"
)


def _needed(function: str) -> set[str]:
    if function == "torch.Generator":
        return {"device"}
    return {"dtype", "device"} if re.fullmatch(FACTORIES, function) else set()


def _incomplete(path: Path) -> list[str]:
    """Return the calls of torch's factories without dtype or device, with their lines."""
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    return [
        f"{path}:{call.lineno}: {ast.unparse(call)}"
        for call in calls
        if _needed(ast.unparse(call.func)) - {keyword.arg for keyword in call.keywords}
    ]


@pytest.mark.parametrize("package", [starflow, starflow_kernels], ids=lambda package: package.__name__)
def test_factories_are_given_dtype_and_device(package):
    found = [line for path in sorted(Path(package.__file__).parent.rglob("*.py")) for line in _incomplete(path)]
    assert not found, "\n".join(found)


def test_a_call_that_follows_the_defaults_is_found(tmp_path):
    path = tmp_path / "module.py"
    path.write_text('torch.zeros(3)\ntorch.ones(3, dtype=torch.int64, device="cpu")\ntorch.Generator()\n')
    assert [line.split(": ")[1] for line in _incomplete(path)] == ["torch.zeros(3)", "torch.Generator()"]
