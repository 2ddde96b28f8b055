"""Importing needs torch alone, imports point down only, and the examples of the READMEs run."""

from __future__ import annotations

import ast
import graphlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import starflow_kernels

PACKAGE = Path(starflow_kernels.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

STRICT = """
import importlib.metadata as metadata, re, sys

def requirements(name):
    found, queue = set(), [name]
    while queue:
        distribution = re.sub("[-_.]+", "-", queue.pop()).lower()
        if distribution in found or distribution == "triton":
            continue
        try:
            wanted = metadata.requires(distribution) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(distribution)
        queue += [re.match("[A-Za-z0-9._-]+", w)[0] for w in wanted if "extra ==" not in w]
    return found

distributions = requirements("torch") | {"numpy"}
allowed = {*sys.stdlib_module_names, "starflow_kernels", "__mp_main__"}
for module, owners in metadata.packages_distributions().items():
    if distributions & {re.sub("[-_.]+", "-", owner).lower() for owner in owners}:
        allowed.add(module)
refused = set()

class Finder:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in allowed:
            refused.add(top)
            raise ModuleNotFoundError(f"{name} is refused", name=name)

sys.meta_path.insert(0, Finder())
before = set(sys.modules)
import starflow_kernels
import torch
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
print("imported", starflow_kernels.__file__)
"""


def test_importing_needs_torch_alone():
    """In a process in which only the standard library, torch, what torch requires and numpy can be imported."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    process = subprocess.run([sys.executable, "-c", STRICT], capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == ["imported", str(PACKAGE / "__init__.py")]


WITHOUT_TRITON = """
import sys
import torch
assert "triton" not in sys.modules
torch.cuda.device_count = lambda: GPUS
from starflow_kernels import affine_flow, backends, causal_attention, flow_head
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
assert "triton" not in sys.modules
"""


@pytest.mark.parametrize(
    "gpus, reason, listed",
    [(0, "torch sees no GPU", "torch sees no GPU, and TRITON_INTERPRET is not 1"), (1, "not on cpu", "available")],
)
def test_calls_on_the_cpu_never_import_triton(gpus, reason, listed, tmp_path):
    """With an installed package of that name, and with and without a GPU."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{PACKAGE.parent}"}
    environment.pop("TRITON_INTERPRET", None)
    code = f"GPUS, REASON = {gpus}, {reason!r}\n{WITHOUT_TRITON}"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == listed


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imported(path: Path) -> set[str]:
    """Absolute names that a file imports anywhere, of names taken from a package those that are modules of ours."""
    package = path.relative_to(PACKAGE.parent).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            anchor = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join([*anchor, *([node.module] if node.module else [])])
            inner = {f"{source}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= inner or {source}
    return found


GRAPH = {name: imported(path) for name, path in MODULES.items()}


def backend(name: str) -> str | None:
    """Name of the backend that a module of an op folder implements: triton_step.py is a part of triton."""
    parts = name.split(".")
    return parts[2].partition("_")[0] if len(parts) == 3 and parts[2] != "api" else None


def test_the_reader_of_imports_sees_them():
    assert "starflow_kernels.affine_flow.reference" in GRAPH["starflow_kernels.affine_flow_inverse.reference"]
    assert "starflow_kernels.block.reference" in GRAPH["starflow_kernels.block.api"]
    assert "starflow_kernels.checks" in GRAPH["starflow_kernels.block.api"]
    assert backend("starflow_kernels.block.reference") == "reference"


@pytest.mark.parametrize("name", MODULES)
def test_kernels_never_import_the_models(name):
    assert not {m for m in GRAPH[name] if m.partition(".")[0] == "starflow"}


def test_imports_have_no_cycle():
    graph = {name: {m for m in modules if m in MODULES and m != name} for name, modules in GRAPH.items()}
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("name", [name for name in MODULES if backend(name)])
def test_backends_import_no_other_backend_and_no_api(name):
    """A backend may use the same backend of other ops, the specification, and what lies below the ops."""
    inside = {m for m in GRAPH[name] if m.startswith("starflow_kernels.") and len(m.split(".")) == 3}
    assert {m for m in inside if backend(m) not in (backend(name), "reference")} == set()


@pytest.mark.parametrize("name", ["checks", "dispatch", "library", "spec"])
def test_the_ground_floor_imports_no_op(name):
    ours = {m for m in GRAPH[f"starflow_kernels.{name}"] if m.startswith("starflow_kernels")}
    assert ours <= {f"starflow_kernels.{n}" for n in ("checks", "dispatch", "library", "spec")}


@pytest.mark.parametrize("readme", sorted(PACKAGE.glob("*/README.md")), ids=lambda path: path.parent.name)
def test_readme_examples_run(readme):
    examples = re.findall(r"```python\n(.*?)```", readme.read_text(), flags=re.DOTALL)
    assert examples
    for example in examples:
        exec(compile(example, str(readme), "exec"), {})
