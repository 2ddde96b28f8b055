"""Tensors are made with a dtype and a device, and text files are opened with an encoding: no defaults act on them."""

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


def _needed(call: ast.Call) -> set[str]:
    function = ast.unparse(call.func)
    if function == "torch.Generator":
        return {"device"}
    is_text = function == "open" and not (len(call.args) > 1 and "b" in ast.unparse(call.args[1]).strip("'"))
    if is_text or function.endswith((".read_text", ".write_text")):
        return {"encoding"}
    return {"dtype", "device"} if re.fullmatch(FACTORIES, function) else set()


def _incomplete(path: Path) -> list[str]:
    """Return the calls that lack a dtype, a device or an encoding, with their lines."""
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    return [
        f"{path}:{call.lineno}: {ast.unparse(call)}"
        for call in calls
        if _needed(call) - {keyword.arg for keyword in call.keywords}
    ]


@pytest.mark.parametrize("package", [starflow, starflow_kernels], ids=lambda package: package.__name__)
def test_factories_are_given_dtype_and_device_and_files_an_encoding(package):
    found = [line for path in sorted(Path(package.__file__).parent.rglob("*.py")) for line in _incomplete(path)]
    assert not found, "\n".join(found)


def test_a_call_that_follows_the_defaults_is_found(tmp_path):
    path = tmp_path / "module.py"
    right = ['torch.ones(3, dtype=torch.int64, device="cpu")', 'open(path, "rb")', 'path.read_text(encoding="utf-8")']
    wrong = ["torch.zeros(3)", "torch.Generator()", "open(path, 'w')", "path.read_text()"]
    path.write_text("\n".join([*right, *wrong]))
    assert [line.split(": ")[1] for line in _incomplete(path)] == wrong
