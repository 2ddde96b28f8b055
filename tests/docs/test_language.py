"""Docstrings begin with a verb or a noun, so that their first words say what is there."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path for package in ("starflow", "starflow_kernels") for path in (ROOT / package).rglob("*.py"))
REFUSED = {"Of", "Those", "That", "What", "As"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_docstrings_begin_with_a_verb_or_a_noun(path):
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    documented = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, nodes)]
    first_words = {(ast.get_docstring(node) or "_").split()[0]: node for node in documented}
    assert not REFUSED & first_words.keys(), [
        getattr(first_words[word], "name", "module") for word in REFUSED & first_words.keys()
    ]
