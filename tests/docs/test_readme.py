"""The README's examples run, and its commands parse."""

import re
import shlex
from pathlib import Path

import pytest

from starflow.cli import parser

README = (Path(__file__).parents[2] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line.split("#")[0] for line in README.replace("\\\n", " ").splitlines() if line.startswith("    starflow ")]


@pytest.mark.parametrize("example", EXAMPLES)
def test_example(example, tmp_path, monkeypatch):
    if "starflow.pipelines" in example:
        pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command):
    words = shlex.split(command)
    assert parser().parse_args(words[1:]).command == words[1]


def test_there_are_some():
    assert len(EXAMPLES) >= 3 and len(COMMANDS) >= 3
