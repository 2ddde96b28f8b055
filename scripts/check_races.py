"""Run the persistent kernel in emulation under ThreadSanitizer, then without each of its barriers in turn.

ThreadSanitizer must report no race, and every missing barrier must be noticed: by it, or by results that differ from
one order of the threads to the next, are not finite, or do not come at all. Takes some minutes; `--quick` leaves out
ThreadSanitizer.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
KERNEL = ("cuda/products.h", "cuda/persistent.h")
WAITS = re.compile(r"^ *(block_barrier|warp_barrier|grid_barrier|wait_for_copy|wait_for_count)\(.*\);$", re.M)
# Arguments of csrc/emulation/races.cpp.
CASES = ["0 3 5 0 2", "1 3 5 1 2", "1 2 5 0 3", "2 3 3 1 4"]
RACE_CASES = ["0 2 3 0 2", "1 3 2 1 2", "2 2 2 1 4"]


def build(folder: Path, texts: dict[str, str], *flags: str) -> Path:
    """Build the driver from a copy of csrc/ with other texts of the kernel."""
    csrc = folder / "csrc"
    if not csrc.exists():
        shutil.copytree(ROOT / "csrc", csrc)
    for name, text in texts.items():
        (csrc / name).write_text(text, encoding="utf-8")
    target = folder / f"races{len(flags)}"
    sources = [str(csrc / "emulation" / f"{name}.cpp") for name in ("races", "persistent")]
    command = ["g++", "-std=c++20", "-O1", "-ffp-contract=off", *flags, "-o", str(target), *sources]
    subprocess.run(command, check=True, capture_output=True)
    return target


def fails(program: Path, case: str) -> bool:
    """Return whether a case gives other results, or a race is reported."""
    try:
        return subprocess.run([program, *case.split()], capture_output=True, timeout=300).returncode != 0
    except subprocess.TimeoutExpired:
        return True


def noticed(texts: dict[str, str], tsan: bool) -> str | None:
    """Return what notices a mistake in the kernel, or None."""
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder), texts)
        if any(fails(program, case) for case in CASES):
            return "orders"
        if tsan:
            program = build(Path(folder), texts, "-g", "-fsanitize=thread")
            if any(fails(program, case) for case in RACE_CASES):
                return "ThreadSanitizer"
    return None


def mutants(texts: dict[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Give the place of each barrier, and the texts of the kernel without it."""
    for name, text in texts.items():
        for wait in WAITS.finditer(text):
            line = text.count("\n", 0, wait.start()) + 1
            yield f"{name}:{line}: {wait[0].strip()}", {**texts, name: text[: wait.start()] + text[wait.end() :]}


def main() -> int:
    """Print a table of the barriers; return 1 if one is not noticed, or if the kernel has a race."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="without ThreadSanitizer")
    parser.add_argument("--only", type=int, help="number of the one barrier to remove")
    arguments = parser.parse_args()
    texts = {name: (ROOT / "csrc" / name).read_text(encoding="utf-8") for name in KERNEL}
    missed, count = 0, 0
    if arguments.only is None and (reason := noticed(texts, not arguments.quick)):
        print(f"the kernel fails by {reason}")
        return 1
    for number, (place, mutant) in enumerate(mutants(texts)):
        if arguments.only in (None, number):
            reason = noticed(mutant, not arguments.quick)
            print(f"{number} {place} noticed by {reason or 'NOTHING'}", flush=True)
            missed, count = missed + (reason is None), count + 1
    print(f"{count - missed} of {count} noticed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
