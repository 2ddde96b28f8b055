"""The GPU backends on one GPU: checks of every op, then times beside their floors and peers.

    python -m benchmarks.gpu          # writes benchmarks/results/gpu_<device>.json and .md
    python -m benchmarks.gpu --ops block_inverse --peer DIR --checkpoint DIR   # sampling alone, with the released loop
    python -m benchmarks.gpu --ops causal_attention --write-table   # and lets the package choose by the times
    python -m benchmarks.gpu --dry    # the same code on the CPU in Triton's interpreter: tiny shapes, no claims

A check that fails is recorded and the rest goes on; the exit status is then 1. The floor of a time is the larger of
bytes / copy bandwidth and operations / bfloat16 matrix product peak, both measured in the same run. Beside the results
lie those of all attention backends as entries of the table that chooses among them, gpu_<device>_attention.json.
Sampling, `block_inverse`, comes last and has a budget of seconds: what does not fit is written down as skipped.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

from starflow_kernels import backends
from starflow_kernels.causal_attention import timings

from ..machine import HERE, description
from ..peers.released import load_peer
from . import choice, sampling, sampling_checks
from .bench import Bench, Clock, Skip, attempt
from .op_cases import CHECKED, DRY, MAKE, TIMED, Case

SAMPLING = "block_inverse"
# Seconds after which the whole run should be over; of those of sampling what checks and a trained flow may take.
LONGEST, CHECKS_SHARE, TRAINED_SHARE = 570, 0.4, 0.25


def passes(function: Callable, tensors: list[torch.Tensor], grads: list | None = None) -> list[torch.Tensor]:
    """Outputs of function(tensors) and the gradients of all tensors, for outputs' gradients of a fixed draw."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    outputs = function(tensors)
    if grads is None:
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(o.shape, generator=generator).to(o.device, o.dtype) for o in outputs]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, tensors, grads)]


def ours(case: Case) -> Callable:
    """The op on Triton."""
    return lambda tensors: case.run(tensors, "triton")


def plain(case: Case) -> Callable:
    """The specification in plain PyTorch."""
    return lambda tensors: case.run(tensors, "reference")


def equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Raise unless they are the same to the bit."""
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        if not torch.equal(a, b):
            raise AssertionError(f"result {i}: largest difference {(a.double() - b.double()).abs().max().item():.2e}")


def contract(case: Case, bench: Bench, wide: torch.dtype = torch.float64) -> str:
    """Outputs and gradients against the specification in a wider dtype."""
    found = passes(ours(case), case.tensors)
    usual = passes(plain(case), case.tensors)
    exact = [t.double() for t in passes(plain(case), [t.to(wide) for t in case.tensors])]
    worst = 0.0
    for i, (value, torchs, right) in enumerate(zip(found, usual, exact, strict=True)):
        if not torch.isfinite(value).all():
            raise AssertionError(f"result {i} is not finite")
        error, allowed = ((t.double() - right).abs().max().item() for t in (value, torchs))
        bound = 2 * (allowed + torch.finfo(value.dtype).eps * right.abs().max().item())
        worst = max(worst, error / bound)
    if worst > 1:
        raise AssertionError(f"{worst:.2f} of the error that the contract allows")
    return f"{worst:.2f} of the allowed error"


def deterministic(case: Case, bench: Bench) -> None:
    """Twice the same."""
    equal(passes(ours(case), case.tensors), passes(ours(case), case.tensors))


def batch_invariant(case: Case, bench: Bench) -> None:
    """A row alone and in the batch."""
    if case.shape[0] == 1:
        raise Skip("one row")

    def rows(results: list[torch.Tensor], outputs: int) -> list[torch.Tensor]:
        return results[: outputs + case.batched]

    outputs = len(ours(case)(case.tensors))
    generator = torch.Generator().manual_seed(2)
    grads = [torch.randn(o.shape, generator=generator).to(o.device, o.dtype) for o in ours(case)(case.tensors)]
    batch = rows(passes(ours(case), case.tensors, grads), outputs)
    alone = [t[-1:] if i < case.batched else t for i, t in enumerate(case.tensors)]
    equal(rows(passes(ours(case), alone, [g[-1:] for g in grads]), outputs), [t[-1:] for t in batch])


def compiles(case: Case, bench: Bench) -> None:
    """As one graph, with the same bits."""
    torch._dynamo.reset()
    graph = torch.compile(ours(case), fullgraph=True, backend=bench.compiler)
    equal(passes(graph, case.tensors), passes(ours(case), case.tensors))


def checkpoints(case: Case, bench: Bench) -> None:
    """Under activation checkpointing."""
    again = lambda tensors: checkpoint(ours(case), tensors, use_reentrant=False)  # noqa: E731
    equal(passes(again, case.tensors), passes(ours(case), case.tensors))


def autocasts(case: Case, bench: Bench) -> None:
    """Autocast leaves the op in the dtypes of its inputs."""
    with torch.autocast(bench.device, torch.bfloat16 if case.tensors[0].dtype == torch.float16 else torch.float16):
        inside = ours(case)(case.tensors)
    equal(list(inside), list(ours(case)(case.tensors)))


def captures(case: Case, bench: Bench) -> None:
    """In a CUDA graph, replayed on new inputs."""
    if bench.dry:
        raise Skip("it needs a GPU")
    static = [t.clone().zero_() for t in case.tensors]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), torch.no_grad():
        ours(case)(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        outputs = ours(case)(static)
    for t, value in zip(static, case.tensors):
        t.copy_(value)
    graph.replay()
    equal(list(outputs), list(ours(case)(case.tensors)))


CHECKS = {
    "error contract": contract,
    "determinism": deterministic,
    "batch invariance": batch_invariant,
    "fullgraph compile": compiles,
    "checkpointing": checkpoints,
    "autocast": autocasts,
    "CUDA graph": captures,
}


def check(op: str, shape: tuple[int, ...], dtype: torch.dtype, bench: Bench) -> list[dict]:
    """A row a check."""
    rows = []
    for name, function in CHECKS.items():
        result, note = attempt(lambda function=function: function(MAKE[op](shape, dtype, bench.device), bench))
        rows.append({"op": op, "shape": shape, "dtype": str(dtype)[6:], "check": name, "result": result, "note": note})
        print(f"{op} {shape} {rows[-1]['dtype']}: {name} {result} {note}", flush=True)
    return rows


def time_op(op: str, shape: tuple[int, ...], bench: Bench, ceilings: dict[str, float]) -> list[dict]:
    """A row a pass and code, once the op is right at this shape."""
    case, rows = MAKE[op](shape, bench.timed_dtype, bench.device), []
    error = contract(case, bench, torch.float64 if bench.timed_dtype == torch.float32 else torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(plain(case), backend=bench.compiler)
    ones = [torch.ones_like(output) for output in plain(case)(case.tensors)]
    codes = {"ours": ours(case), "eager reference": plain(case), "compiled reference": compiled, **case.peers}
    for gradient in (False, True):
        moved = case.bytes * (1 + case.backward_bytes if gradient else 1)
        operations = case.flops * (1 + case.backward_flops if gradient else 1)
        floor = max(moved / ceilings["bytes_a_second"], operations / ceilings["operations_a_second"])
        row = {"op": op, "shape": shape, "dtype": str(bench.timed_dtype)[6:], "pass": "both" if gradient else "forward"}
        row["error"] = error
        for name, function in codes.items():

            def run(function=function, gradient=gradient):
                if gradient:
                    return passes(function, case.tensors, ones)
                with torch.no_grad():
                    return function(case.tensors)

            def measure(run=run):
                run()
                return {"seconds": bench.seconds(run), "peak_bytes": bench.peak_memory(run)}

            result, found = attempt(measure)
            timings = found if result == "passed" else {"failed": found}
            rows.append({**row, "code": name, "floor_seconds": floor, **timings})
            if not bench.dry:
                print(rows[-1], flush=True)
    return rows


def machine(bench: Bench) -> dict[str, str | int]:
    """Device, driver, versions, commit and date."""
    triton = importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else "not installed"
    found = {**description(), "triton": triton, "device": "CPU, Triton's interpreter: a dry run"}
    if not bench.dry:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            driver = "unknown"
        capability = "sm_{}{}".format(*torch.cuda.get_device_capability())
        found |= {"device": torch.cuda.get_device_name(), "capability": capability, "driver": driver}
        found |= {"cuda": torch.version.cuda or torch.version.hip or "unknown"}
    return found


def markdown(result: dict) -> str:
    """The result as a page."""
    lines = ["# GPU kernels on " + result["machine"]["device"], ""]
    lines += [f"- {name}: {value}" for name, value in result["machine"].items()]
    lines += [f"- {name}: {value:.3e}" for name, value in result["ceilings"].items()]
    lines += ["", "| op | shape | dtype | check | result | note |", "|---|---|---|---|---|---|"]
    for r in result["checks"]:
        note = r["note"].replace("|", "/").replace("\n", " ")
        lines.append(f"| {r['op']} | {r['shape']} | {r['dtype']} | {r['check']} | {r['result']} | {note} |")
    lines += [
        "",
        "| op | shape | pass | code | us | floor, us | of the floor | peak MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in result["timings"]:
        where = f"| {r['op']} | {r['shape']} | {r['pass']} | {r['code']} "
        if "failed" in r:
            lines.append(f"{where}| failed | | | |")
            continue
        memory = "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**20:.0f}"
        us, floor = 1e6 * r["seconds"], 1e6 * r["floor_seconds"]
        lines.append(f"{where}| {us:.1f} | {floor:.1f} | {floor / us:.0%} | {memory} |")
    attention, sampling = result["attention"], result["sampling"]
    page = "\n".join(lines) + "\n" + (choice.markdown(attention) if attention else "")
    return page + (sampling.markdown(sampling) if sampling else "")


def compare_attention(bench: Bench, result: dict, path: Path) -> None:
    """Time every attention backend and write the entries of the table."""
    dtypes = [torch.float32] if bench.dry else [torch.bfloat16, torch.float16]
    for shape in choice.DRY if bench.dry else choice.SHAPES:
        for dtype in dtypes:
            result["attention"] += choice.measure(shape, dtype, bench.device, bench.seconds)
    device = torch.device(bench.device)
    timings.write(path, choice.entries(result["attention"], device, result["machine"]))


def sample(bench: Bench, result: dict, args: argparse.Namespace, seconds: float, save: Callable) -> None:
    """Checks and times of sampling in so many seconds, of which checks may take a share."""
    checks = Clock(CHECKS_SHARE * seconds)
    clock = Clock(seconds)
    for row in sampling_checks.checks(bench, checks):
        result["checks"].append(row)
        print(*row.values(), flush=True)
    save()
    peer, given = load_peer(args.peer) if args.peer else None, (bench, result["ceilings"])
    row = {"case": "trained flow", "weights": "", "code": "all"}
    for rows in (
        sampling.cases(*given, peer, clock, reserved=TRAINED_SHARE * seconds if args.checkpoint else 0),
        sampling.trained(args.checkpoint, *given, peer, clock)
        if args.checkpoint
        else [{**row, "skipped": "it needs --checkpoint"}],
    ):
        for found in rows:
            result["sampling"].append(found)
            if not bench.dry:
                print(found, flush=True)
            save()


def write(result: dict, path: Path) -> None:
    """The result as JSON and as a page."""
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(result))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU, results to a temporary folder")
    parser.add_argument("--ops", nargs="+", choices=[*MAKE, SAMPLING], default=[*MAKE, SAMPLING])
    parser.add_argument("--write-table", action="store_true", help="put the entries into the package's table too")
    parser.add_argument("--peer", type=Path, help="folder with transformer_flow.py of the released TarFlow")
    parser.add_argument("--checkpoint", help="a trained flow, a folder or a bundled one, for the parallel inverses")
    parser.add_argument("--seconds", type=float, default=280, help="budget of checks and times of sampling")
    args = parser.parse_args()
    start = time.perf_counter()
    if args.dry and args.write_table:
        parser.error("--write-table: a dry run measures nothing")
    if args.dry:
        os.environ["TRITON_INTERPRET"] = "1"
    listing = {op: backends().get(op, {}).get("triton") for op in args.ops}
    runs = [op for op, state in listing.items() if (state or "").startswith("available")]
    ops = [op for op in runs if op in MAKE]
    on_chip = SAMPLING in args.ops and not args.dry and torch.cuda.is_available()  # needs no Triton
    if not runs and not on_chip:
        print(f"nothing to run: {listing}", file=sys.stderr)
        return 1
    bench = Bench(args.dry)
    result = {"machine": machine(bench), "ceilings": bench.ceilings(), "checks": [], "timings": [], "attention": []}
    result["sampling"] = []
    folder = Path(tempfile.mkdtemp()) if args.dry else HERE / "results"
    name = "dry" if args.dry else "".join(c if c.isalnum() else "_" for c in result["machine"]["device"].lower())
    for op in ops:
        for shape in (DRY if args.dry else CHECKED)[op]:
            for dtype in bench.dtypes:
                result["checks"] += check(op, shape, dtype, bench)
        for shape in (DRY if args.dry else TIMED)[op]:
            state, rows = attempt(time_op, op, shape, bench, result["ceilings"])
            if state == "failed":
                rows = [{"op": op, "shape": shape, "dtype": "", "pass": "", "code": "all", "failed": rows}]
            result["timings"] += rows
        write(result, folder / f"gpu_{name}")
    if "causal_attention" in ops:
        path = folder / f"gpu_{name}_attention.json"
        path.unlink(missing_ok=True)
        compare_attention(bench, result, path)
        if args.write_table:
            timings.write(choice.TABLE, timings.Table(path).entries)
        write(result, folder / f"gpu_{name}")
    if SAMPLING in args.ops:
        left = min(args.seconds, LONGEST - (time.perf_counter() - start))
        sample(bench, result, args, left, lambda: write(result, folder / f"gpu_{name}"))
    timed = result["timings"] + result["sampling"]
    failed = [r for r in result["checks"] if r["result"] == "failed"] + [r for r in timed if "failed" in r]
    counts = f"{len(result['checks'])} checks, {len(timed)} timings, {len(failed)} failed"
    print(f"{counts}: {folder}/gpu_{name}.md")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
