"""The Python code of README.md, docs/ and the op READMEs runs, their commands parse, and their links lead somewhere."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from support.pages import blocks, commands

from benchmarks import tables
from starflow.cli import parser

ROOT = Path(__file__).parents[2]
READMES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]
PAGES = [*READMES, *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("starflow_kernels/*/README.md"))]
LINK = re.compile(r"(?:\]\(|href=\")([^)\s\"]+)")
# Libraries that an example needs beside this one.
ADAPTED = re.compile(r"(?:starflow_kernels\.adapters\.|^import )(zuko|nflows|normflows|pyro|sbi)\b", re.MULTILINE)
# Commands of other programs, which are not looked into.
FOREIGN = {"pip", "mkdocs", "ruff"}


def name(path: Path) -> str:
    """Path of a page below the root, as the name of its test."""
    return path.relative_to(ROOT).as_posix()


COMMANDS = [pytest.param(line, id=f"{name(page)}: {line}") for page in PAGES for line in commands(page)]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name)
def test_python_blocks_of_a_page_run_one_after_the_other(page, tmp_path, monkeypatch, request):
    found = blocks(page, "python")
    monkeypatch.chdir(tmp_path)
    for library in sorted({match for _, text in found for match in ADAPTED.findall(text)}):
        pytest.importorskip(library)
    if any("Pipeline" in text for _, text in found):
        for part in request.getfixturevalue("stand_ins").iterdir():
            shutil.copytree(part, tmp_path / part.name)
    namespace = {"__name__": "__main__"}
    for line, text in found:
        exec(compile("\n" * (line - 1) + text, str(page), "exec"), namespace)


def test_every_op_readme_has_an_example():
    readmes = sorted(ROOT.glob("starflow_kernels/*/README.md"))
    assert readmes and all(blocks(readme, "python") for readme in readmes)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist(command):
    words = shlex.split(command, comments=True)
    while "=" in words[0]:
        words = words[1:]
    if words[0] == "torchrun":
        words = words[words.index("-m") + 1 :]
    if words[0] == "starflow":
        assert parser().parse_args(words[1:]).command == words[1]
    elif words[:2] == ["python", "-m"]:
        assert words[2] == "build" or importlib.util.find_spec(words[2]), words[2]
    elif words[0] in ("bash", "pytest", "python"):
        paths = [word for word in words[1:] if "/" in word]
        assert paths and all(list(ROOT.glob(path)) for path in paths), paths
    else:
        assert words[0] in FOREIGN


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files(page):
    text = "\n".join(line for line in page.read_text().splitlines() if not line.startswith("    "))
    targets = [link.partition("#")[0] for link in LINK.findall(text) if "://" not in link]
    missing = [target for target in targets if target and not (page.parent / target).exists()]
    assert not missing


def test_readme_is_one_screen():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) < 900
    assert text[: text.index("```python")].count("\n") < 30


@pytest.mark.parametrize("page", tables.PAGES, ids=name)
def test_tables_are_those_of_the_results(page):
    text = page.read_text()
    assert "<!-- end -->" in text
    assert tables.filled(text) == text, "python -m benchmarks tables"


def measured(value: float, error: float, digits: int) -> str:
    """A value with its standard error, as tables show it; "none" where the error is above all that is meaningful."""
    return f"{value:.{digits}f} ± {error:.{digits}f}" if error < 100 else "none"


def boltzmann_cells(row: dict) -> set[str]:
    return {
        *row["case"].split(", ", 2)[1:],
        measured(100 * row["ess"], 100 * row["ess_error"], 1),
        measured(row["free_energy"], row["free_energy_error"], 3),
    }


def posterior_cells(row: dict) -> set[str]:
    cells = {*row["case"].split(", "), measured(row["nats"], row["error"], 3)}
    return cells | ({f"{min(row['p_values'].values()):.1g}"} if "p_values" in row else set())


def estimator_cells(row: dict) -> set[str]:
    cells = {*row["case"].split(", "), f"{row['c2st']:.3f}"}
    return cells | ({f"{row['sampling_seconds']:.2f}"} if "sampling_seconds" in row else set())


def sampling_cells(row: dict) -> set[str]:
    flow, inverse = row["case"].split(", ", 1)
    return {flow, inverse, f"{row['samples_per_second']:,.0f}"}


@pytest.mark.parametrize(
    "results, cells",
    [
        ("boltzmann_wells", boltzmann_cells),
        ("boltzmann_lennard_jones", boltzmann_cells),
        ("posteriors", posterior_cells),
        ("posterior_sampling", sampling_cells),
        ("sbi_estimators", estimator_cells),
    ],
)
def test_tables_of_the_science_guide_show_the_measured_rows(results, cells):
    text = (ROOT / "docs" / "guides" / "science.md").read_text()
    table = [{cell.strip() for cell in line.split("|")} for line in text.splitlines()]
    for row in json.loads((ROOT / "benchmarks" / "results" / f"{results}_cpu.json").read_text())["rows"]:
        assert any(cells(row) <= line for line in table), row["case"]
