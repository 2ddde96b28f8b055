"""Compile every Triton kernel without a GPU and read what it takes of a chip: registers, spills, shared memory.

    python -m benchmarks.gpu.triton_resources --check --results build/triton.json --write docs/triton.md

Every kernel of launches.py is compiled for every target as it is launched: pointers aligned to 16 bytes, widths that
16 divides. --check fails if registers are spilled, if a target lacks the shared memory, on products in tf32, and if
ptxas gives up an optimization, such as products of tensor cores that overlap. It also fails if loops of LOOPS wait for
memory more often, or load less in the background, than they do now. --results keeps the numbers of each version of
Triton; the table has all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import json
import multiprocessing
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .launches import LAUNCHES, TARGETS, Launch
from .sass_loops import Loops, loops

SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
# A linear model of 128 values fills the registers of a program.
WIDEST_MODEL = "block_sweep_settle, 2 neighbours, D = 64"
LARGE_MODEL = "block_sweep_settle, 2 neighbours, D = 192"
# (version of Triton, target, kernel) -> bytes of stack per thread that no block size avoids; all others allow none.
STACK_LIMIT: dict[tuple[str, str, str], int] = {
    ("3.9.0", "sm_80", WIDEST_MODEL): 152,
    ("3.9.0", "sm_90", WIDEST_MODEL): 104,
    ("3.9.0", "sm_100", WIDEST_MODEL): 112,
    ("3.6.0", "sm_90", WIDEST_MODEL): 88,
    ("3.9.0", "sm_80", "block_qkv, sweep, bf16, d = 64"): 8,
    ("3.9.0", "sm_80", "block_qkv, sweep, bf16, d = 256"): 8,
    ("3.9.0", "sm_80", "block_qkv, sweep, fp32, d = 64"): 8,
    ("3.9.0", "gfx942", "block_head, fp32, D = 768"): 176,
    ("3.9.0", "sm_100", "block_head, bf16, D = 128"): 16,
    ("3.9.0", "sm_100", LARGE_MODEL): 32,
    ("3.9.0", "sm_100", "residual_norm_backward, fp32, rms_norm, C = 768"): 24,
    ("3.9.0", "sm_100", "residual_norm_backward, fp32, rms_norm, C = 1024"): 24,
    ("3.6.0", "sm_90", LARGE_MODEL): 32,
    ("3.6.0", "sm_90", "block_qkv, fp32, fp8 weights"): 8,
    ("3.6.0", "sm_90", "block_up, fp32, fp8 weights"): 8,
    ("3.6.0", "sm_90", "block_up, bf16, post-norms, gated"): 8,
    ("3.6.0", "sm_90", "block_qkv, sweep, bf16, d = 64"): 8,
    ("3.6.0", "sm_90", "block_sweep_attend, fp32, d = 256"): 8,
}
# (version of Triton, target, kernel) whose products of tensor cores may not overlap: two per iteration, of depth 16.
SERIALIZED = {
    ("3.6.0", "sm_90", "flow_head_backward, bf16, D = 4"),
    ("3.6.0", "sm_90", "flow_head_backward, bf16, D = 16"),
}
# Kernel -> the most loops that wait for memory, and the fewest bytes in flight, of its rows in bf16.
LOOPS = {
    "block_qkv": Loops(3, 38912),
    "block_attend": Loops(1, 32768),
    "block_up": Loops(3, 49152),
    "block_product": Loops(0, 24576),
    "causal_attention_forward": Loops(0, 16384),
    "causal_attention_queries": Loops(0, 8192),
}
LOOPS_TARGET = "sm_90"
PAGE = """# Resources of the Triton kernels

Each cell gives registers per thread / bytes of stack per thread (spilled registers) / bytes of shared memory per block.
Each row is a kernel in a shipped configuration. Triton {versions} compiled all of them without a GPU; a cell has two
numbers where the versions differ. Attention rows without "window" see all earlier tokens.

`python -m benchmarks.gpu.triton_resources --results build/triton.json --write docs/triton.md` writes this page, by
Triton 3.6 with `--targets sm_90`, then by Triton 3.9.

{table}
"""


class Resources(NamedTuple):
    """Registers per thread, bytes of stack per thread (spills), bytes of shared memory per block.

    tf32: whether products round float32 to tf32, which would break the error contract.
    warning: warning of ptxas that it gives up an optimization.
    loops: what the loops of a kernel of LOOPS load on LOOPS_TARGET.
    """

    registers: int
    stack: int
    shared: int
    tf32: bool = False
    warning: str = ""
    loops: tuple[int, int] | None = None


# (row of the table, target) -> resources
Measured = dict[tuple[str, str], Resources]


def compiled(launch: Launch, target: GPUTarget):
    """Return the compiled kernel."""
    names = list(inspect.signature(launch.kernel.fn).parameters)
    options = {name: value for name, value in launch.constants.items() if name not in names}
    signature = {name: launch.types.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in launch.constants.items() if name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kept) in enumerate(zip(names, launch.kernel.params))
        if not (kept.do_not_specialize or kept.do_not_specialize_on_alignment)
        and (signature[name][0] == "*" or name in launch.sizes)
    }
    source = ASTSource(launch.kernel, signature, constants, aligned)
    return triton.compile(source, target=target, options={"enable_fp_fusion": True, **options})


def parsed(text: str, shared: int) -> Resources:
    """Return the resources from the log of ptxas or from the assembly of an AMD kernel."""
    if registers := re.search(r"Used (\d+) registers", text):
        stack, warning = re.findall(r"(\d+) bytes stack frame", text), re.search(r"\(C75\d\d\).*", text)
        return Resources(int(registers[1]), max(map(int, stack)), shared, warning=warning[0] if warning else "")
    fields = {key: int(value) for key, value in re.findall(r"\.(\w+): +(\d+)", text)}
    return Resources(fields["vgpr_count"], fields["private_segment_fixed_size"], shared)


def bound(row: str, target: str) -> Loops | None:
    """Return the bound of LOOPS for a row of the table on a target."""
    return LOOPS.get(row.split(",")[0]) if target == LOOPS_TARGET and ", bf16" in row else None


def resources(launch: Launch, target: str, with_loops: bool = False) -> Resources:
    """Return the resources of a kernel on the target of that name."""
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope():
        # A cached kernel has no log.
        triton.knobs.compilation.always_compile = triton.knobs.nvidia.dump_ptxas_log = True
        with contextlib.redirect_stdout(io.StringIO()) as log:
            kernel = compiled(launch, TARGETS[target])
    if "cubin" not in kernel.asm:
        return parsed(kernel.asm["amdgcn"], kernel.metadata.shared)
    found = parsed(log.getvalue(), kernel.metadata.shared)._replace(tf32="tf32" in kernel.asm["ptx"])
    if not with_loops:
        return found
    return found._replace(loops=loops(kernel.asm["sass"], kernel.metadata.num_warps, kernel.metadata.num_stages))


def complaint(found: Resources, target: str, limit: int = 0, bound: Loops | None = None) -> str | None:
    """Return what exceeds the limits of the target, or None.

    Args:
        found: of a kernel.
        target: name of the target.
        limit: allowed bytes of stack per thread.
        bound: the most loops that wait for memory, and the fewest bytes in flight.
    """
    if bound and found.loops and (found.loops[0] > bound.waiting or found.loops[1] < bound.in_flight):
        return f"{found.loops[0]} loops wait for memory, {found.loops[1]} bytes are in flight on {target}"
    if found.tf32:
        return f"products in tf32 on {target}"
    if found.warning:
        return f"ptxas on {target}: {found.warning}"
    if found.shared > SHARED_LIMIT[target]:
        return f"{found.shared} bytes of shared memory, {target} has {SHARED_LIMIT[target]}"
    return f"{found.stack} bytes of stack per thread on {target}" if found.stack > limit else None


def _measured(job: tuple[str, str]) -> Resources:
    row, target = job
    launch = LAUNCHES[row]
    with_loops = bound(row, target) is not None
    return resources(launch[target] if isinstance(launch, dict) else launch, target, with_loops)


def table(versions: list[Measured], targets: list[str]) -> str:
    """Return a Markdown table with one row per kernel, from the resources that each version of Triton gives."""

    def cell(row: str, target: str) -> str:
        by_version = zip(*(version[row, target][:3] for version in versions if (row, target) in version))
        return " / ".join(", ".join(map(str, dict.fromkeys(values))) for values in by_version)

    lines = ["| kernel | " + " | ".join(targets) + " |", "|---|" + "---|" * len(targets)]
    for row in dict.fromkeys(row for row, _ in versions[-1]):
        lines.append(f"| {row} | " + " | ".join(cell(row, target) for target in targets) + " |")
    return "\n".join(lines)


def kept(path: Path, found: Measured) -> dict[str, Measured]:
    """Write the resources of this version of Triton to a file; return those of all versions for the same kernels."""
    stored = json.loads(path.read_text()) if path.exists() else {}
    stored[triton.__version__] = [[*job, *value] for job, value in found.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(stored))
    return {
        version: {(row, target): Resources(*value) for row, target, *value in rows}
        for version, rows in sorted(stored.items())
        if {row for row, *_ in rows} == {row for row, _ in found}
    }


def main() -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="chips to compile for")
    parser.add_argument("--kernels", default="", help="compile only the rows whose name contains this text")
    parser.add_argument("--check", action="store_true", help="fail on what is said above")
    parser.add_argument("--results", type=Path, help="keep the numbers in this file, beside those of other versions")
    parser.add_argument("--write", type=Path, help="write the page to this file")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="number of processes")
    args = parser.parse_args()
    jobs = [(row, target) for row in LAUNCHES if args.kernels in row for target in args.targets]
    with multiprocessing.get_context("fork").Pool(args.jobs) as pool:
        found = dict(zip(jobs, pool.map(_measured, jobs, chunksize=1)))
    versions = kept(args.results, found) if args.results else {triton.__version__: found}
    page = PAGE.format(versions=" and ".join(versions), table=table(list(versions.values()), args.targets))
    print(page)
    if args.write:
        args.write.write_text(page)
    complaints = []
    for (row, target), value in found.items():
        key = triton.__version__, target, row
        accepted = value._replace(warning="") if key in SERIALIZED else value
        if why := complaint(accepted, target, STACK_LIMIT.get(key, 0), bound(row, target)):
            complaints.append(f"{row}: {why}")
    for line in complaints:
        print(line, file=sys.stderr)
    return 1 if args.check and complaints else 0


if __name__ == "__main__":
    sys.exit(main())
