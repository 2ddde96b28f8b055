"""Run the CUDA kernels in emulation under ThreadSanitizer, then without each of their barriers in turn.

ThreadSanitizer must report no race, and every missing barrier must be noticed: by it, or by results that differ from
one order of the threads to the next, are not finite, or do not come at all.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
BARRIER = re.compile(
    r"^( *)((?:block_|warp_|grid_|cluster_|cluster\.|)barrier|wait_for_copy|wait_for_count)(\(.*\);)$", re.M
)


class Kernel(NamedTuple):
    """A kernel with its barriers.

    Args:
        files: headers that hold the barriers.
        cases: arguments of csrc/emulation/races_<name>.cpp, behind the first, without ThreadSanitizer.
        race_cases: those with it, of fewer orders.
    """

    files: tuple[str, ...]
    cases: tuple[str, ...]
    race_cases: tuple[str, ...]


KERNELS = {
    "onchip": Kernel(
        ("onchip.h",),
        ("0 1 5 0 1", "1 1 5 1 0", "1 2 5 0 1", "0 2 5 1 0", "1 4 4 1 1"),
        ("0 1 3 0 1", "1 2 3 1 0", "1 1 3 0 0", "0 2 3 0 1", "1 4 3 1 1"),
    ),
    "persistent": Kernel(
        ("products.h", "persistent.h"),
        ("0 3 5 0 2", "1 3 5 1 2", "1 2 5 0 3", "2 3 3 1 4"),
        ("0 2 4 0 2", "1 3 3 1 2", "2 2 3 1 4"),
    ),
}


def numbered(folder: Path, files: tuple[str, ...]) -> list[str]:
    """Make each barrier in the kernel's files depend on `removed_barrier`; return their places."""
    places = []
    for name in files:
        path = folder / "cuda" / name
        text = path.read_text(encoding="utf-8")

        def optional(found: re.Match, name=name, text=text) -> str:
            places.append(f"{name}:{text.count(chr(10), 0, found.start()) + 1}: {found[0].strip()}")
            return f"{found[1]}if (removed_barrier != {len(places) - 1}) {found[2]}{found[3]}"

        path.write_text("extern int removed_barrier;\n" + BARRIER.sub(optional, text), encoding="utf-8")
    return places


def build(folder: Path, name: str, target: str, *flags: str) -> Path:
    """Build the driver of a kernel from a copy of csrc/."""
    sources = [str(folder / "emulation" / f"{source}.cpp") for source in (f"races_{name}", name)]
    command = ["g++", "-std=c++20", "-O1", "-ffp-contract=off", *flags, "-o", str(folder / target), *sources]
    subprocess.run(command, check=True)
    return folder / target


def fails(program: Path, removed: int, case: str) -> bool:
    """Return whether a case gives other results, a race is reported, or there is no end."""
    # A busy machine must not pass for a kernel without an end.
    limit = 1200 if removed < 0 else 120
    try:
        return (
            subprocess.run([program, str(removed), *case.split()], capture_output=True, timeout=limit).returncode != 0
        )
    except subprocess.TimeoutExpired:
        return True


def check(name: str, workers: ThreadPoolExecutor) -> bool:
    """Print what notices that barriers are missing in a kernel; return whether something does, and only then."""
    kernel = KERNELS[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "csrc"
        shutil.copytree(ROOT / "csrc", folder)
        places = numbered(folder, kernel.files)
        plain = workers.submit(build, folder, name, "plain")
        raced = workers.submit(build, folder, name, "raced", "-g", "-fsanitize=thread").result()
        runs = [("its orders", plain.result(), case) for case in kernel.cases]
        runs += [("ThreadSanitizer", raced, case) for case in kernel.race_cases]

        def noticed(removed: int) -> str | None:
            return next((why for why, program, case in runs if fails(program, removed, case)), None)

        reasons = workers.map(noticed, range(-1, len(places)))
        if failure := next(reasons):
            print(f"{name} fails by {failure}")
            return False
        missed = 0
        for place, reason in zip(places, reasons):
            print(f"{place} noticed by {reason or 'NOTHING'}", flush=True)
            missed += reason is None
    print(f"{name}: no race; {len(places) - missed} of {len(places)} missing barriers noticed", flush=True)
    return not missed


def main() -> int:
    """Check the kernels; return 1 if one has a race, or if a missing barrier is not noticed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="number of processes")
    arguments = parser.parse_args()
    with ThreadPoolExecutor(arguments.jobs) as workers:
        return 0 if all([check(name, workers) for name in arguments.kernels]) else 1


if __name__ == "__main__":
    sys.exit(main())
