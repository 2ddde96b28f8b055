"""Two programs for a machine with a GPU: a first contact of two minutes, and the measurement.

    python -m benchmarks.gpu smoke --out DIR    # versions, every kernel once, constants of the chip, racecheck
    python -m benchmarks.gpu --out DIR          # sampling, ops, the table of attention backends, all other checks
    python -m benchmarks.gpu --only sampling --peer DIR2 --checkpoint DIR3     # cases by their names
    python -m benchmarks.gpu --only "attention table" --write-table   # the package then chooses by these times
    python -m benchmarks.gpu smoke --dry        # the same code on the CPU in Triton's interpreter, at tiny shapes

Each case runs in a process of its own and ends after its limit. Its rows go to DIR/smoke.jsonl or DIR/bench.jsonl as
they come, and all of them to a page beside it at the end. A program that was interrupted, or had no time for a case,
continues if it is called again with the same DIR. What cannot run is skipped with the reason; the exit status is 1 if
something failed. benchmarks.gpu.pack makes a folder for `--pack` that saves the time to compile.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", nargs="?", choices=("smoke", "bench"), default="bench", help="default: bench")
    parser.add_argument("--out", type=Path, help="folder of the results; default: runs/gpu, of a dry run a new one")
    parser.add_argument("--pack", type=Path, default=ROOT / "build" / "gpu", help="folder of what was compiled before")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--list", action="store_true", help="print the cases and their limits, and run nothing")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="cases whose name contains one of these"
    )
    parser.add_argument("--seconds", type=float, help="for the whole program; default: 120 for smoke, 450 for bench")
    parser.add_argument("--peer", type=Path, help="folder with transformer_flow.py of the released TarFlow")
    parser.add_argument("--checkpoint", help="trained flow, a folder or a bundled name; default: digits")
    parser.add_argument("--compiled", action="store_true", help="time what torch.compile makes of each op too")
    parser.add_argument("--write-table", action="store_true", help="add the attention times to the package's table")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def prepare(args: argparse.Namespace) -> None:
    """Set the environment of this process and its children, before torch and Triton are imported."""
    if args.dry:
        os.environ["TRITON_INTERPRET"] = "1"
        return
    from .pack import relocate

    library = args.pack / "_cuda.abi3.so"
    if library.exists() and not (ROOT / "starflow_kernels" / library.name).exists():
        shutil.copy(library, ROOT / "starflow_kernels")
    cache = args.pack / "triton"
    relocate(cache)
    os.environ["TRITON_CACHE_DIR"] = str(cache.absolute())


def main() -> int:
    """Run the command line; return its exit status."""
    command = parser()
    args = command.parse_args()
    if args.dry and args.write_table:
        command.error("--write-table: a dry run measures nothing")
    if not args.worker and not args.list:
        prepare(args)
    args.out = args.out or (Path(tempfile.mkdtemp()) if args.dry else Path("runs/gpu"))
    if not args.checkpoint and not args.dry:
        args.checkpoint = next((str(path) for path in args.pack.glob("checkpoint/*")), "digits")
    # Only now, since Triton reads its environment when it is imported.
    from . import page
    from .programs import PROGRAMS, SECONDS
    from .runner import Rows, run, serve

    cases = [
        case for case in PROGRAMS[args.program](args) if any(text in case.name for text in ["machine", *args.only])
    ]
    if args.list:
        print(*(f"{case.seconds:4g} s  {case.name}" for case in cases), sep="\n")
        return 0
    rows = Rows(args.out / f"{args.program}.jsonl")
    if args.worker:
        serve(cases, rows)
        return 0
    worker = [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:], "--worker", "--out", str(args.out)]
    seconds = args.seconds or (float("inf") if args.dry else SECONDS[args.program])
    missing = run(cases, rows, worker, seconds)
    results, text = list(rows.results()), page.markdown(rows)
    rows.path.with_suffix(".md").write_text(text)
    if page.attention_rows(rows):
        page.write_table(rows, args.out / "attention.json")
        if args.write_table:
            page.write_table(rows, page.choice.TABLE)
    failed = [row for row in results if "failed" in row or row.get("result") == "failed"]
    for name in missing:
        print(f"no time was left for: {name}")
    print(f"{len(results)} rows, {len(failed)} failed: {rows.path.with_suffix('.md')}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
