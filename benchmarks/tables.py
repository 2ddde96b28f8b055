"""The tables of README.md and docs/ that show results: written between two comments from the files in results/."""

from __future__ import annotations

import json
import re
from pathlib import Path

from .cpu.sampling import strongest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs" / "benchmarks" / "index.md"]
# A page names the table that it wants: <!-- speed --> ... <!-- end -->.
PLACE = re.compile(r"<!-- (\w+) -->\n.*?<!-- end -->", re.DOTALL)
PEER_NAMES = {"released": "released", "plain": "plain", "compiled": "compiled", "onnxruntime": "ONNX Runtime"}


def results(name: str) -> dict:
    """Return a results file."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}_cpu.json").read_text())


def table(header: list[str], rows: list[list[str]]) -> str:
    """Format a table."""
    first, *others = (f"| {' | '.join(cells)} |\n" for cells in [header, *rows])
    return first + "|---" * len(header) + "|\n" + "".join(others)


def line(machine: dict) -> str:
    """Return a machine, with its ceilings if its run measured them."""
    text = f"{machine['date']}, {machine['cpu']}, {machine['threads']} threads"
    if "float32_gflops" not in machine:
        return text
    return f"{text}, {machine['float32_gflops']:.0f} GFLOP/s, {machine['read_gb_per_second']:.0f} GB/s from memory"


def runs(found: dict) -> str:
    """Return a line per run: its machine, and its cases if there are more runs."""
    cases: dict[str, list[str]] = {}
    for row in found["rows"]:
        cases.setdefault(line(row.get("machine", found["machine"])), []).append(row["case"])
    if len(cases) == 1:
        return f"Measured {next(iter(cases))}.\n\n"
    return "".join(f"- Measured {run}: {'; '.join(names)}.\n" for run, names in cases.items()) + "\n"


def number(error: float) -> str:
    """Format an error."""
    return f"{error:.1e}".replace("e-0", "e-")


def times(row: dict, name: str) -> str:
    """Return how many times longer a peer takes, or that it does not run."""
    return (
        f"{row['microseconds'][name] / row['microseconds']['ours']:.1f}x" if name in row["microseconds"] else "not run"
    )


def error(row: dict, name: str) -> str:
    """Return a largest error."""
    return number(row["error"][name]) if name in row["error"] else "not compared"


def speed() -> str:
    """Return the table of README.md: the strongest peer of each case that has more than one."""
    found = results("sampling")
    header = ["case", "ours, µs per step", "strongest peer / ours", "strongest peer", "our largest error"]
    rows = [
        [
            row["case"],
            f"{row['microseconds']['ours']:.1f}",
            times(row, strongest(row)),
            PEER_NAMES[strongest(row)],
            error(row, "ours"),
        ]
        for row in found["rows"]
        if "plain" in row["microseconds"]
    ]
    return runs(found) + table(header, rows)


def sampling() -> str:
    """Return all peers of all cases."""
    found = results("sampling")
    header = ["case", "ours, µs per step", "floor, µs", "bound of the floor", "strongest peer / ours"]
    header += [f"{name} / ours" for name in PEER_NAMES.values()]
    rows = [
        [
            row["case"],
            f"{row['microseconds']['ours']:.1f}",
            f"{row['floor_microseconds']:.1f}",
            row["floor"].removeprefix("bytes at "),
            times(row, strongest(row)),
            *(times(row, name) for name in PEER_NAMES),
        ]
        for row in found["rows"]
    ]
    return runs(found) + table(header, rows)


def errors() -> str:
    """Return the largest errors of sampling against float64."""
    ways = {"ours": "ours", **PEER_NAMES}
    rows = [[row["case"], *(error(row, name) for name in ways)] for row in results("sampling")["rows"]]
    return table(["case", *ways.values()], rows)


TABLES = {"speed": speed, "sampling": sampling, "errors": errors}


def filled(page: str) -> str:
    """Return the text of a page with its tables."""
    return PLACE.sub(lambda place: f"<!-- {place[1]} -->\n{TABLES[place[1]]()}<!-- end -->", page)
