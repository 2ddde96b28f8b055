"""Compare two commits: times of processes that take turns, and instructions, which repeat almost exactly.

Both commits are built outside of the working tree. Each gets the benchmarks of the working tree, so that both run the
same cases.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def _git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True).stdout


def build(commit: str, parent: Path) -> Path:
    """Return the folder of a commit below `parent`, where its kernels are built unless they are there."""
    folder = parent / _git("rev-parse", "--short=12", f"{commit}^{{commit}}").decode().strip()
    if not list(folder.glob("starflow_kernels/_native*.so")):
        with tarfile.open(fileobj=io.BytesIO(_git("archive", commit))) as files:
            files.extractall(folder, filter="data")
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(command, cwd=folder, check=True, env={**os.environ, "STARFLOW_NATIVE": "1"})
    shutil.rmtree(folder / "benchmarks", ignore_errors=True)
    shutil.copytree(ROOT / "benchmarks", folder / "benchmarks")
    return folder


def run(folder: Path, cases: list[str], *options: str, prefix: tuple[str, ...] = ()) -> dict:
    """Return what `compare_cases` prints about cases in the folder of a commit."""
    command = [*prefix, sys.executable, "-m", "benchmarks.compare_cases", *options, *cases]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONHASHSEED": "0"}
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def times(folders: list[Path], cases: list[str], pairs: int, *options: str) -> dict[str, list[list[float]]]:
    """Return per case the seconds of either folder in each pair of processes; the first of a pair takes turns."""
    found: dict[str, list[list[float]]] = {case: [[], []] for case in cases}
    for pair in range(pairs):
        for side in (0, 1) if pair % 2 == 0 else (1, 0):
            for case, seconds in run(folders[side], cases, *options)["seconds"].items():
                found[case][side].append(seconds)
    return found


def instructions(folder: Path, cases: list[str]) -> tuple[dict[str, int], str]:
    """Return the instructions of one call of each case on one thread, and the instruction set that valgrind offers."""
    out = folder / "callgrind.out"
    for old in folder.glob("callgrind.out*"):
        old.unlink()
    valgrind = ("valgrind", "-q", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}")
    kind = run(folder, cases, "--count", "--threads", "1", prefix=valgrind)["instruction_set"]
    # Callgrind numbers its files in the order of the dumps.
    return {case: total(Path(f"{out}.{i}").read_text()) for i, case in enumerate(cases, 1)}, kind


def total(profile: str) -> int:
    """Return the instructions of a profile of callgrind."""
    return int(next(line for line in profile.splitlines() if line.startswith("totals:")).split()[1])


def rows(measured: dict[str, list[list[float]]], counts: list[dict[str, int]]) -> list[dict]:
    """Return a row per case: median times, the median of the paired ratios B / A, and instructions if counted."""
    found = []
    for case, (a, b) in measured.items():
        ratios = [second / first for first, second in zip(a, b, strict=True)]
        row = {
            "case": case,
            "microseconds": [1e6 * statistics.median(a), 1e6 * statistics.median(b)],
            "ratio": statistics.median(ratios),
            "ratios": ratios,
        }
        if counts:
            row["instructions"] = [each[case] for each in counts]
            row["instruction_ratio"] = counts[1][case] / counts[0][case]
        found.append(row)
    return found


def markdown(found: list[dict]) -> str:
    """Format the rows as a table."""
    lines = [
        "| case | A, us | B, us | B / A (from, to) | A, instructions | B, instructions | B / A |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        a, b = row["microseconds"]
        counted = ["not counted"] * 3
        if "instructions" in row:
            counted = [*(f"{count:,}" for count in row["instructions"]), f"{row['instruction_ratio']:.4f}"]
        lines.append(
            f"| {row['case']} | {a:.1f} | {b:.1f} | {row['ratio']:.3f} ({min(row['ratios']):.3f}, "
            f"{max(row['ratios']):.3f}) | {' | '.join(counted)} |"
        )
    return "\n".join(lines)
