"""Files of the checkout that runs its tests."""

from __future__ import annotations

import os
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
# Folders that tools and builds write to.
TOOL_FOLDERS = {".git", ".venv", "build", "dist", "site", "__pycache__", ".pytest_cache", ".ruff_cache", ".benchmarks"}


def checkout_files() -> set[str]:
    """Return the paths of all files in the checkout, except for those of tools and builds."""
    found = set()
    for folder, folders, names in os.walk(CHECKOUT):
        folders[:] = [name for name in folders if name not in TOOL_FOLDERS]
        found.update(os.path.join(folder, name) for name in names)
    return found
