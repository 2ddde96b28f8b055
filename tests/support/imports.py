"""Python processes in which only some packages can be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Makes every import fail but those of `modules`, of the standard library, and of `distributions` and what they require.
PRELUDE = """
import importlib.metadata as metadata, re, sys

def requirements(names):
    found, queue = set(), list(names)
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

distributions = requirements(distributions)
allowed = {*sys.stdlib_module_names, *modules, "__mp_main__"}
for module, owners in metadata.packages_distributions().items():
    if distributions & {re.sub("[-_.]+", "-", owner).lower() for owner in owners}:
        allowed.add(module)
refused = set()

class Allowing:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in allowed or top.startswith("_sysconfigdata"):
            return self.finder.find_spec(name, path, target)
        refused.add(top)

sys.meta_path[:] = map(Allowing, sys.meta_path)
"""


def python(
    code: str, *arguments: str, distributions: Collection[str], modules: Collection[str]
) -> subprocess.CompletedProcess[str]:
    """Run code in a process in which only these distributions, their requirements and these modules can be imported."""
    names = f"distributions, modules = {sorted(distributions)}, {sorted(modules)}"
    return subprocess.run(
        [sys.executable, "-c", f"{names}\n{PRELUDE}\n{code}", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
