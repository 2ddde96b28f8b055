"""The examples run to their end, where they check their own results."""

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(example, capsys):
    for library in re.findall(r"^(?:import|from) (zuko|sbi)\b", example.read_text(), re.MULTILINE):
        pytest.importorskip(library)
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out
