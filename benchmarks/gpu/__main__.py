"""Check and time the GPU backends on one GPU, beside their floors and peers.

    python -m benchmarks.gpu          # writes benchmarks/results/gpu_<device>.json and .md
    python -m benchmarks.gpu --ops block_inverse --peer DIR --checkpoint DIR   # sampling alone, with the released loop
    python -m benchmarks.gpu --ops causal_attention --write-table   # the package then chooses by these times
    python -m benchmarks.gpu --dry    # the same code on the CPU in Triton's interpreter: tiny shapes, no claims

A check that fails is recorded and the run goes on; the exit status is then 1. The floor of a time is the larger of
bytes / copy bandwidth and operations / peak of a bfloat16 matrix product, both measured in the same run. The times of
all attention backends are also written as entries of the table that chooses among them, gpu_<device>_attention.json.
Sampling, `block_inverse`, comes last within a budget of seconds; whatever does not fit is recorded as skipped.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from starflow_kernels import backends
from starflow_kernels.causal_attention import timings

from ..machine import HERE
from ..peers.released import load_peer
from . import choice, sampling, sampling_checks
from .bench import Bench, Clock, attempt
from .op_cases import CHECKED, DRY, MAKE, TIMED
from .op_checks import check
from .op_times import time_op
from .page import machine, write

SAMPLING = "block_inverse"
# Seconds after which the whole run should end.
LONGEST = 570
# Share of the seconds of sampling that its checks may take.
CHECKS_SHARE = 0.4
# Share of the seconds of sampling that is reserved for a trained flow.
TRAINED_SHARE = 0.25


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU; results go to a temporary folder")
    parser.add_argument("--ops", nargs="+", choices=[*MAKE, SAMPLING], default=[*MAKE, SAMPLING], help="ops to run")
    parser.add_argument("--write-table", action="store_true", help="add the attention times to the package's table")
    parser.add_argument("--peer", type=Path, help="folder with transformer_flow.py of the released TarFlow")
    parser.add_argument("--checkpoint", help="trained flow for the parallel inverses: a folder or a bundled name")
    parser.add_argument("--seconds", type=float, default=280, help="seconds for the checks and times of sampling")
    return parser


def run_op(op: str, bench: Bench, result: dict) -> None:
    """Check and time an op at all its shapes."""
    for shape in (DRY if bench.dry else CHECKED)[op]:
        for dtype in bench.dtypes:
            result["checks"] += check(op, shape, dtype, bench)
    for shape in (DRY if bench.dry else TIMED)[op]:
        state, rows = attempt(time_op, op, shape, bench, result["ceilings"])
        if state == "failed":
            rows = [{"op": op, "shape": shape, "dtype": "", "pass": "", "code": "all", "failed": rows}]
        result["timings"] += rows


def sample(bench: Bench, result: dict, args: argparse.Namespace, seconds: float, save: Callable) -> None:
    """Check and time sampling in about `seconds`; save() is called after each row."""
    checks = Clock(CHECKS_SHARE * seconds)
    clock = Clock(seconds)
    for row in sampling_checks.checks(bench, checks):
        result["checks"].append(row)
        print(*row.values(), flush=True)
    save()
    peer, ceilings = load_peer(args.peer) if args.peer else None, result["ceilings"]
    reserved = TRAINED_SHARE * seconds if args.checkpoint else 0
    rows = [sampling.cases(bench, ceilings, peer, clock, reserved)]
    if args.checkpoint:
        rows.append(sampling.trained(args.checkpoint, bench, ceilings, peer, clock))
    else:
        rows.append([{"case": "trained flow", "weights": "", "code": "all", "skipped": "it needs --checkpoint"}])
    for row in (row for some in rows for row in some):
        result["sampling"].append(row)
        if not bench.dry:
            print(row, flush=True)
        save()


def main() -> int:
    """Run the command line; return its exit status."""
    command, start = parser(), time.perf_counter()
    args = command.parse_args()
    if args.dry and args.write_table:
        command.error("--write-table: a dry run measures nothing")
    if args.dry:
        os.environ["TRITON_INTERPRET"] = "1"
    listing = {op: backends().get(op, {}).get("triton") for op in args.ops}
    available = [op for op, state in listing.items() if (state or "").startswith("available")]
    # Sampling by the CUDA backend needs no Triton.
    on_chip = SAMPLING in args.ops and not args.dry and torch.cuda.is_available()
    if not available and not on_chip:
        print(f"nothing to run: {listing}", file=sys.stderr)
        return 1
    bench = Bench(args.dry)
    result = {"machine": machine(bench), "ceilings": bench.ceilings()}
    result |= {"checks": [], "timings": [], "attention": [], "sampling": []}
    folder = Path(tempfile.mkdtemp()) if args.dry else HERE / "results"
    name = "dry" if args.dry else "".join(c if c.isalnum() else "_" for c in result["machine"]["device"].lower())
    path = folder / f"gpu_{name}"

    def save():
        write(result, path)

    for op in (op for op in available if op in MAKE):
        run_op(op, bench, result)
        save()
    if "causal_attention" in available:
        table = folder / f"gpu_{name}_attention.json"
        table.unlink(missing_ok=True)
        result["attention"] = choice.measure_all(bench)
        timings.write(table, choice.entries(result["attention"], torch.device(bench.device), result["machine"]))
        if args.write_table:
            timings.write(choice.TABLE, timings.Table(table).entries)
        save()
    if SAMPLING in args.ops:
        sample(bench, result, args, min(args.seconds, LONGEST - (time.perf_counter() - start)), save)
    timed = result["timings"] + result["sampling"]
    failed = [r for r in result["checks"] if r["result"] == "failed"] + [r for r in timed if "failed" in r]
    print(f"{len(result['checks'])} checks, {len(timed)} timings, {len(failed)} failed: {path}.md")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
