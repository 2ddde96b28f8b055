"""All benchmarks of the CPU: run them, compare two commits, write the tables of the documentation.

python -m benchmarks run --peer DIR             # all; results go to build/benchmarks
python -m benchmarks run --only sampling long --peer DIR
python -m benchmarks compare COMMIT_A COMMIT_B  # times of both in turns, and instructions
python -m benchmarks tables                     # into README.md and docs/, from benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import string
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from . import compare, tables
from .compare_cases import CASES
from .machine import description

RESULTS = Path("build/benchmarks")
# Name -> module and arguments; an argument in braces is an option of `run`, without which the benchmark is left out.
BENCHMARKS = {
    "ops": "ops",
    "sampling": "cpu.sampling --peer {peer}",
    "bfloat16_products": "cpu.bfloat16_products",
    "long": "cpu.long",
    "contention": "cpu.contention",
    "density": "cpu.density --peer {peer}",
    "accelerate": "cpu.accelerate --peer {peer}",
    "parallel": "cpu.parallel digits",
    "parallel_samples": "cpu.parallel digits --samples 1000",
    "fingerprint": "cpu.fingerprint",
    "inverse_gradient": "cpu.inverse_gradient",
    "pipeline": "cpu.pipeline",
    "prose": "cpu.prose --upstream {upstream}",
    "throughput": "cpu.throughput",
}
# These train flows for many minutes, and run on request.
SCIENCE = {
    "posterior_sampling": "cpu.posterior_sampling",
    "boltzmann_wells": "science.boltzmann --systems 'double wells'",
    "boltzmann_lennard_jones": "science.boltzmann --systems Lennard-Jones",
    "image_density": "science.image_density",
    "posteriors": "science.posteriors",
    "sbi_estimators": "science.sbi_estimators",
}


def run(args: argparse.Namespace) -> int:
    """Run benchmarks one after the other, each in a process of its own; return 1 if one failed."""
    args.results.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in args.only or BENCHMARKS:
        command = {**BENCHMARKS, **SCIENCE}[name]
        needed = [field for _, field, _, _ in string.Formatter().parse(command) if field]
        if missing := [field for field in needed if getattr(args, field) is None]:
            print(f"{name}: left out, it needs {', '.join(f'--{field}' for field in missing)}", flush=True)
            continue
        print(f"{name}: {command}", flush=True)
        module, *options = (part.format(**vars(args)) for part in shlex.split(command))
        file = args.results / f"{name}_cpu.json"
        done = subprocess.run([sys.executable, "-m", f"benchmarks.{module}", *options, "--json", str(file)])
        failed += [name] if done.returncode else []
    print(f"failed: {', '.join(failed)}" if failed else f"results: {args.results}")
    return 1 if failed else 0


def compare_commits(args: argparse.Namespace) -> int:
    """Print the comparison of two commits as a table."""
    cases = [case for case in CASES if any(part in case for part in args.cases.split("|"))]
    with tempfile.TemporaryDirectory() as temporary:
        folders = [compare.build(commit, args.keep or Path(temporary)) for commit in (args.a, args.b)]
        options = ["--threads", str(args.threads), "--seconds", str(args.seconds)]
        measured = compare.times(folders, cases, args.pairs, *options)
        counts, note = [], "instructions are not counted"
        if args.count and not shutil.which("valgrind"):
            note += ": valgrind is not installed"
        elif args.count:
            counts, kinds = zip(*(compare.instructions(folder, cases) for folder in folders), strict=True)
            note = f"instructions of one call on one thread under callgrind, in the instruction set {kinds[0]}"
        found = compare.rows(measured, counts)
    torch.set_num_threads(args.threads)
    machine = description()
    print(f"A {args.a}, B {args.b}\n{tables.line(machine)}\n{note}\n\n{compare.markdown(found)}")
    if args.json:
        result = {"machine": machine, "commits": [args.a, args.b], "note": note, "rows": found}
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def write_tables(args: argparse.Namespace) -> int:
    """Write the tables of the documentation."""
    for page in tables.PAGES:
        page.write_text(tables.filled(page.read_text()))
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    top = argparse.ArgumentParser(
        prog="benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(required=True)
    each = commands.add_parser("run", help="run benchmarks")
    each.add_argument("--only", nargs="+", choices=[*BENCHMARKS, *SCIENCE], help="by default all but those that train")
    each.add_argument("--peer", type=Path, help="folder with the released transformer_flow.py")
    each.add_argument("--upstream", type=Path, help="folder src of transferable-samplers")
    each.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    each.set_defaults(call=run)
    each = commands.add_parser("compare", help="compare two commits")
    each.add_argument("a", metavar="COMMIT_A")
    each.add_argument("b", metavar="COMMIT_B")
    each.add_argument("--cases", default="", help="only cases whose name contains one of these, by '|'")
    each.add_argument("--pairs", type=int, default=5, help="pairs of processes")
    each.add_argument("--seconds", type=float, default=0.3, help="duration of a case in a process")
    each.add_argument("--threads", type=int, default=2)
    each.add_argument("--no-count", dest="count", action="store_false", help="do not count instructions")
    each.add_argument("--keep", type=Path, help="folder that keeps the builds for the next time")
    each.add_argument("--json", type=Path, help="write the comparison and the machine here")
    each.set_defaults(call=compare_commits)
    each = commands.add_parser("tables", help="write the tables of README.md and docs/")
    each.set_defaults(call=write_tables)
    return top


if __name__ == "__main__":
    args = parser().parse_args()
    sys.exit(args.call(args))
