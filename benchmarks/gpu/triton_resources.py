"""What each Triton kernel takes of a chip, read out of the compiled code; needs no GPU.

    python -m benchmarks.gpu.triton_resources --check --results build/triton.json --write docs/triton.md

Every kernel is compiled in every shipped configuration for every target, as it is launched: pointers on 16 bytes, sizes
that 16 divides. --check fails where registers are spilled or a target lacks the shared memory. --results keeps what
each version of Triton gives; the table has all of them.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from starflow_kernels._triton import rotary
from starflow_kernels._triton.tiles import blocks
from starflow_kernels.affine_flow import triton as affine_flow
from starflow_kernels.attention_flow import triton as attention_flow
from starflow_kernels.bias_gelu import triton as bias_gelu
from starflow_kernels.block.triton import head_kernels, step_kernels, sweep_kernels, sweeps
from starflow_kernels.block.triton import sequential as block
from starflow_kernels.causal_attention import triton as causal_attention
from starflow_kernels.flow_head import triton as flow_head
from starflow_kernels.residual_norm import triton as residual_norm

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# (version of Triton, target, kernel) -> bytes of stack a thread that no choice of blocks avoids; all others have none.
# A linear model of 128 values is as large as the registers of a program.
WIDEST_MODEL = "sweep settle, 2 neighbours, D = 64"
STACK_LIMIT: dict[tuple[str, str, str], int] = {
    ("3.9.0", "sm_80", WIDEST_MODEL): 152,
    ("3.9.0", "sm_90", WIDEST_MODEL): 104,
    ("3.9.0", "sm_100", WIDEST_MODEL): 112,
    ("3.6.0", "sm_90", WIDEST_MODEL): 88,
}
PAGE = """# What the Triton kernels take of a chip

Registers a thread / bytes of stack a thread (spilled registers) / bytes of shared memory a block, of every kernel in
every shipped configuration, compiled without a GPU by Triton {versions}; two numbers where the versions differ. Rows
without "window" see all tokens before their own. Written by
`python -m benchmarks.gpu.triton_resources --results build/triton.json --write docs/triton.md`, run with each version.

{table}
"""
STRIDES = tuple(f"{name}_{of}" for name in "qkvg" for of in ("row", "token", "head"))
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}


class Launch(NamedTuple):
    """A kernel, the types of its run-time arguments, and its compile-time ones, num_warps and num_stages among them.

    sizes: the arguments that 16 divides.
    """

    kernel: triton.JITFunction
    types: dict[str, str]
    constants: dict
    sizes: tuple[str, ...] = ("T", "C", "D", *STRIDES)


class Resources(NamedTuple):
    """Registers a thread, bytes of stack a thread (spills), bytes of shared memory a block."""

    registers: int
    stack: int
    shared: int


def _by_chip(launch: Callable[..., Launch], *args) -> dict[str, Launch]:
    """The launch on each target, with its own blocks."""
    return {name: launch(args[0], name, *args[1:]) for name in TARGETS}


def _affine_flow() -> dict[str, Launch]:
    options = {"SHIFT": True, "FLIP": True, **affine_flow.CONFIG}
    variants = {"softplus, clip": {"SCALE": "softplus", "CLIPPED": True}, "exp": {"SCALE": "exp", "CLIPPED": False}}
    sizes = {"T": "i32", "D": "i32", "clip": "fp32", "factor": "fp32"}
    grads = {name: "*bf16" for name in ("x", "params", "z", "grad_z", "grad_x", "grad_params")}
    launches = {}
    for name, variant in variants.items():
        for sum_ in (True, False):
            constants = {**options, **variant, "SUM": sum_}
            label = f"{name}, {'sum' if sum_ else 'none'}"
            forward = Launch(affine_flow.forward_kernel, {**grads, **sizes, "logdet": "*fp32"}, constants)
            constants = {**constants, "HAS_Z": True, "HAS_LOGDET": True}
            backward = Launch(affine_flow.backward_kernel, {**grads, **sizes, "grad_logdet": "*fp32"}, constants)
            launches |= {f"affine_flow, {label}": forward, f"affine_flow_backward, {label}": backward}
    types = {"partial": "*fp32", "logdet": "*fp32", "chunks": "i32", "factor": "fp32"}
    launches["affine_flow, sum of a row"] = Launch(affine_flow.sum_kernel, types, {"BLOCK": 1024})
    return launches


def _flow_head() -> dict[str, dict[str, Launch]]:
    names = ("x", "h", "weight", "bias", "norm_weight", "z", "grad_z", "grad_x", "grad_h")
    others = {name: "*fp32" for name in ("grad_raw", "scaled", "logdet", "grad_logdet")}
    others |= {"T": "i32", "C": "i32", "D": "i32", "clip": "fp32", "share": "fp32"}
    options = {name: True for name in ("CLIPPED", "BIAS", "NORM", "SHIFT", "FLIP", "SUM")} | {"SCALE": "softplus"}

    def launch(kernel: str, chip: str, name: str, dtype: torch.dtype, D: int) -> Launch:
        types = {tensor: f"*{name}" for tensor in names} | others
        constants = {**options, **flow_head.config(D, dtype, chip)}
        if kernel == "backward":
            constants |= {"HAS_Z": True, "HAS_LOGDET": True}
        sizes = ("T", "C", "D") if D % 16 == 0 else ("T", "C")
        return Launch(getattr(flow_head, f"{kernel}_kernel"), types, constants, sizes)

    launches = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        for D in (256,) if name == "fp16" else (4, 16, 32, 64, 128, 256):
            for op, kernel in (("flow_head", "forward"), ("flow_head_backward", "backward")):
                launches[f"{op}, {name}, D = {D}"] = _by_chip(launch, kernel, name, dtype, D)
    return launches


def _glue() -> dict[str, Launch]:
    """The layers between the products of a block: stream and update of one dtype, float32 weights."""
    names = ("x", "update", "total", "normed", "grad_total", "grad_normed", "grad_x", "out", "grad")
    others = dict.fromkeys(("weight", "bias", "partial"), "*fp32") | {"N": "i32", "C": "i32", "programs": "i32"}
    sizes, launches = ("N", "C"), {}
    for dtype, C in itertools.product(("bf16", "fp32"), (64, 768, 1024, 3072, 8192)):
        types = {name: f"*{dtype}" for name in names} | others | {"eps": "fp32"}
        for kind in ("layer_norm", "rms_norm"):
            options = {"KIND": kind, "WEIGHT": True, "BIAS": kind == "layer_norm", **residual_norm.config(C)}
            label = f"{dtype}, {kind}, C = {C}"
            forward = Launch(residual_norm.forward_kernel, types, {**options, "UPDATE": True}, sizes)
            backward = Launch(residual_norm.backward_kernel, types, {**options, "HAS_TOTAL": True}, sizes)
            launches |= {f"residual_norm, {label}": forward, f"residual_norm_backward, {label}": backward}
    for dtype in ("bf16", "fp32"):
        types, options = {name: f"*{dtype}" for name in names} | others, {"BIAS": True, **bias_gelu.CONFIG}
        for part in ("", "_backward"):
            kernel = bias_gelu.backward_kernel if part else bias_gelu.forward_kernel
            launches[f"bias_gelu{part}, {dtype}"] = Launch(kernel, types, options, sizes)
    return launches


def step(kernel: str, dtype: str, d: int, D: int, options: dict, quantize: str = "none") -> Launch:
    """A kernel of a sampling step, heads of d and tokens of D values."""
    weights = ("weight", "bias", "norm_weight", "norm_bias", "post", "head_norms", "gate", "gate_bias", "table")
    stored = (*weights, "in_weight", "in_bias", "k_cache", "v_cache", "hidden")
    states = ("h", "total", "update", "cos", "sin", "scale", "q", "part", "peak", "mass", "cond", "z", "x", "guidance")
    types = dict.fromkeys(stored, f"*{dtype}") | dict.fromkeys((*states, "next_h"), "*fp32") | {"position": "*i32"}
    sizes = ("rows", "n", "C", "D", "slots", "splits", "width", "samples", "stride", "T", "prefix")
    types |= dict.fromkeys(sizes, "i32") | {"clip": "fp32"}
    if kernel == "down":
        types["x"] = f"*{dtype}"
    constants, scales = {"H": 16, "KV": 4, "HEAD": d}, ("weight_scale", "gate_scale")
    if quantize == "none":
        constants |= dict.fromkeys(scales)
    else:
        types |= dict.fromkeys(("weight", "gate"), {"int8": "*i8", "fp8": "*u8"}[quantize])
        types |= dict.fromkeys(scales, "*fp32")
    constants |= {"PDL": False, "stop": None, "BLOCK_S": block.BLOCK_S, "SPLIT": block.SPLIT, "BLOCK_M": block.BLOCK_M}
    constants |= {"DTYPE": {"bf16": tl.bfloat16, "fp32": tl.float32}[dtype]}
    constants |= {"BLOCK_D": block.tile(D if kernel in ("head", "embed") else d), **options}
    constants |= dict.fromkeys(("BIAS", "QK_NORM", "ROTARY", "CLIPPED", "START", "TABLE", "COND"), True)
    constants |= {"COPIES": 2, "RULE": "starflow", "SCALE": "softplus", "PAIRS": rotary.half_tile(d)}
    constants |= block.config(kernel, 2 if dtype == "bf16" else 4, D, d, quantize != "none")
    module = head_kernels if kernel in ("head", "embed") else step_kernels
    aligned = ("C", "D", "slots", "width", "stride")
    return Launch(getattr(module, f"{kernel}_kernel"), types, constants, aligned)


def _step() -> dict[str, Launch | dict[str, Launch]]:
    """Every kernel of a step in both dtypes; the narrowest and the widest heads and tokens, norms where they matter."""
    launches, plain = {}, {"NORM": "layer_norm", "POST": False, "FIRST": True, "GATED": False}
    normed = {"NORM": "rms_norm", "POST": True, "FIRST": False, "GATED": True}
    for dtype in ("bf16", "fp32"):
        for label, options in (("plain", plain), ("post-norms, gated", normed)):
            launches |= {f"block qkv, {dtype}, d = {d}, {label}": step("qkv", dtype, d, 64, options) for d in (64, 256)}
            launches[f"block up, {dtype}, {label}"] = step("up", dtype, 64, 64, options)
        for kernel, d in itertools.product(("attend", "project"), (64, 256)):
            launches[f"block {kernel}, {dtype}, d = {d}"] = step(kernel, dtype, d, 64, plain)
        launches[f"block down, {dtype}"] = step("down", dtype, 64, 64, plain)
        widest = 256 if dtype == "bf16" else 128
        for kernel, D in (("embed", widest), ("head", 12), ("head", 64), ("head", widest)):
            launches[f"block {kernel}, {dtype}, D = {D}"] = step(kernel, dtype, 64, D, normed)
    for dtype, kind in (("bf16", "int8"), ("bf16", "fp8"), ("fp32", "fp8")):
        for kernel in ("qkv", "project", "up", "down"):
            launches[f"block {kernel}, {dtype}, {kind} weights"] = step(kernel, dtype, 64, 64, normed, kind)
    for kernel in ("qkv", "head"):
        early, late = (step(kernel, "bf16", 64, 64, {**normed, "PDL": pdl}) for pdl in (True, False))
        early.constants["launch_pdl"] = True
        by_chip = {chip: early if chip in ("sm_90", "sm_100") else late for chip in TARGETS}
        launches[f"block {kernel}, bf16, dependent launch"] = by_chip
    return launches


def sweep(kernel: str, dtype: str, d: int, D: int, neighbours: int = 0) -> Launch:
    """A kernel of a Jacobi sweep, heads of d and tokens of D values."""
    wide = {"NORM": "rms_norm", "POST": True, "FIRST": False, "GATED": True}
    like = step(kernel if kernel != "settle" else "head", dtype, d, D, wide)
    module = step_kernels if kernel in ("qkv", "project", "up", "down") else sweep_kernels
    whole = ("done", "single", "passes", "fallbacks", "failed", "sweeps", "stop", "learned", "offsets")
    types = like.types
    floats = ("y", "change", "move", "size", "bound", "tol", "residual", *sweeps.NEWTON)
    types |= dict.fromkeys(floats, "*fp32") | dict.fromkeys(whole, "*i32") | {"inputs": "i32", "start": f"*{dtype}"}
    constants = {name: value for name, value in like.constants.items() if name != "stop"}
    if kernel in ("embed", "head", "attend"):
        constants |= sweeps.config(kernel, 2 if dtype == "bf16" else 4, D, d)
    if kernel == "settle":
        inputs = neighbours * D
        constants |= {"WINDOW": 64, "SLIDE": True, "BLOCK_W": 64, "BLOCK_I": block.tile(inputs)}
        constants |= {"num_warps": sweeps.settle_warps(inputs, D)}
        if not neighbours:
            constants |= dict.fromkeys(("offsets", *sweeps.NEWTON))
            types = {name: kind for name, kind in types.items() if name not in ("offsets", *sweeps.NEWTON)}
    aligned = ("C", "D", "slots", "width", "n")
    return Launch(getattr(module, f"{kernel}_kernel"), types, constants, aligned)


def _sweep() -> dict[str, Launch]:
    launches = {}
    for dtype in ("bf16", "fp32"):
        for kernel, d in itertools.product(("qkv", "attend"), (64, 256)):
            launches[f"sweep {kernel}, {dtype}, d = {d}"] = sweep(kernel, dtype, d, 64)
        launches |= {f"sweep {of}, {dtype}": sweep(of, dtype, 64, 64) for of in ("project", "up", "down", "embed")}
        widest = 256 if dtype == "bf16" else 128
        launches |= {f"sweep head, {dtype}, D = {D}": sweep("head", dtype, 64, D) for D in (12, widest)}
    launches["sweep settle, D = 256"] = sweep("settle", "fp32", 64, 256)
    for D in (12, 32, 64):
        launches[f"sweep settle, 2 neighbours, D = {D}"] = sweep("settle", "fp32", 64, D, 2)
    return launches


HEADS = {"T", "H", "group", "window", *STRIDES}
# Sizes of heads -> without a window, with one: each tile of heads both ways, and heads that leave some of it empty.
WINDOWED = {16: (True,), 32: (False,), 64: (False, True), 80: (True,), 128: (False,), 256: (False, True)}


def attention(kernel: str, chip: str, dtype: str, d: int, rotary: str, window: bool) -> Launch:
    """A kernel of causal attention, heads of d values, with the blocks of `chip`."""
    names = ("x", "q", "k", "v", "out", "turned", "grad_out", "grad_q", "grad_k", "grad_v")
    types = {name: f"*{dtype}" for name in names} | dict.fromkeys(("lse", "delta", "grad_lse"), "*fp32")
    types |= dict.fromkeys(HEADS, "i32") | {"factor": "fp32", "scale": "fp32"}
    angle = "constexpr" if rotary == "none" else "*fp32"
    half = rotary.half_tile(d)
    constants = {"WINDOW": window, "HEAD": d, "HALF": half, "ROTARY": rotary}
    constants |= {"cos": None, "sin": None} if rotary == "none" else {}
    if kernel in ("turn", "turn_back", "delta"):
        constants |= {"HAS_LSE": True, "BLOCK_M": 32, "BLOCK": 64}
    else:
        constants |= blocks("causal_attention", kernel, chip, 2 if dtype == "bf16" else 4, 2 * half)
    module = rotary if kernel[:4] == "turn" else causal_attention
    return Launch(getattr(module, f"{kernel}_kernel"), types | {"cos": angle, "sin": angle}, constants)


def flow(kernel: str, chip: str, dtype: str, d: int, D: int, rotary: str = "interleaved", window: bool = True):
    """A kernel of attention_flow, heads of d and tokens of D values, with the blocks of `chip`."""
    names = ("x", "q", "k", "v", "weight", "bias", "z", "out", "grad_z", "grad_x", "grad_q", "grad_k", "grad_v")
    types = {name: f"*{dtype}" for name in names} | dict.fromkeys(HEADS | {"D", "P"}, "i32")
    types |= dict.fromkeys(("cos", "sin", "logdet", "lse", "delta", "grad_logdet", "grad_raw", "grad_lse"), "*fp32")
    types |= dict.fromkeys(("factor", "scale", "clip", "share"), "fp32")
    half = rotary.half_tile(d)
    constants = {"WINDOW": window, "HEAD": d, "HALF": half, "ROTARY": rotary, "SCALE": "softplus", "CLIPPED": True}
    constants |= dict.fromkeys(("BIAS", "SHIFT", "FLIP", "SUM", "HAS_Z", "HAS_LOGDET", "HAS_LSE"), True)
    tile = max(16, triton.next_power_of_2(D))
    constants |= {"BLOCK_D": tile, "BLOCK_P": 2 * tile}
    source = "forward" if kernel == "raw" else kernel
    constants |= blocks("attention_flow", source, chip, 2 if dtype == "bf16" else 4, 2 * half)
    return Launch(getattr(attention_flow, f"{kernel}_kernel"), types, constants)


def _causal_attention() -> dict[str, dict[str, Launch]]:
    cases = {kernel: WINDOWED for kernel in ("forward", "queries", "keys")}
    cases |= {kernel: {32: (False,), 80: (True,), 256: (False,)} for kernel in ("turn", "turn_back", "delta")}
    return {
        f"causal_attention {kernel}, {dtype}, d = {d}{', window' if window else ''}": _by_chip(
            attention, kernel, dtype, d, "interleaved", window
        )
        for kernel, dtype in itertools.product(cases, ("bf16", "fp32"))
        for d, windows in cases[kernel].items()
        for window in windows
    }


def _attention_flow() -> dict[str, dict[str, Launch]]:
    kernels = ("forward", "raw", "queries", "keys")
    return {
        f"attention_flow {kernel}, {dtype}, d = {d}, D = {D}{', window' if window else ''}": _by_chip(
            flow, kernel, dtype, d, D, "interleaved", window
        )
        for kernel, (dtype, D, widest) in itertools.product(kernels, (("bf16", 64, 128), ("fp32", 32, 64)))
        for d, windows in WINDOWED.items()
        for window in windows
        if d <= widest
    }


LAUNCHES = {
    **_affine_flow(),
    **_flow_head(),
    **_glue(),
    **_step(),
    **_sweep(),
    **_causal_attention(),
    **_attention_flow(),
}


def compiled(launch: Launch, target: GPUTarget):
    """The compiled kernel."""
    names = list(inspect.signature(launch.kernel.fn).parameters)
    options = {name: value for name, value in launch.constants.items() if name not in names}
    signature = {name: launch.types.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in launch.constants.items() if name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name][0] == "*" or name in launch.sizes
    }
    source = ASTSource(launch.kernel, signature, constants, aligned)
    return triton.compile(source, target=target, options={"enable_fp_fusion": True, **options})


def parsed(text: str, shared: int) -> Resources:
    """Those that cuobjdump --dump-resource-usage or the assembly of an AMD kernel gives."""
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", text)}
    if not found:
        found = {key: int(value) for key, value in re.findall(r"\.(\w+): +(\d+)", text)}
        return Resources(found["vgpr_count"], found["private_segment_fixed_size"], shared)
    return Resources(found["REG"], found["STACK"], shared)


def resources(launch: Launch, target: str) -> Resources:
    """Those of a kernel on the target of that name."""
    kernel = compiled(launch, TARGETS[target])
    if "cubin" not in kernel.asm:
        return parsed(kernel.asm["amdgcn"], kernel.metadata.shared)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return parsed(text, kernel.metadata.shared)


def complaint(found: Resources, target: str, limit: int = 0) -> str | None:
    """What is wrong with them on the target, where so many bytes of stack are allowed, or None."""
    if found.shared > SHARED_LIMIT[target]:
        return f"{found.shared} bytes of shared memory, {target} has {SHARED_LIMIT[target]}"
    return f"{found.stack} bytes of stack a thread on {target}" if found.stack > limit else None


def _measured(job: tuple[str, str]) -> Resources:
    label, target = job
    launch = LAUNCHES[label]
    return resources(launch[target] if isinstance(launch, dict) else launch, target)


def table(found: list[dict[tuple[str, str], Resources]], targets: list[str]) -> str:
    """Markdown, a row a kernel; found: by each version."""

    def cell(label: str, target: str) -> str:
        by_version = zip(*(version[label, target] for version in found))
        return " / ".join(", ".join(map(str, dict.fromkeys(values))) for values in by_version)

    lines = ["| kernel | " + " | ".join(targets) + " |", "|---|" + "---|" * len(targets)]
    for label in dict.fromkeys(label for label, _ in found[-1]):
        lines.append(f"| {label} | " + " | ".join(cell(label, target) for target in targets) + " |")
    return "\n".join(lines)


def kept(path: Path, found: dict[tuple[str, str], Resources]) -> dict[str, dict[tuple[str, str], Resources]]:
    """What the file has of other versions, and what this one has found; written to the file."""
    stored = json.loads(path.read_text()) if path.exists() else {}
    stored[triton.__version__] = [[*job, *value] for job, value in found.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(stored))
    return {
        version: {(label, target): Resources(*value) for label, target, *value in rows}
        for version, rows in sorted(stored.items())
        if {(label, target) for label, target, *_ in rows} == found.keys()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--kernels", default="", help="only the kernels whose name has this in it")
    parser.add_argument("--check", action="store_true", help="fail on spills and on too much shared memory")
    parser.add_argument("--results", type=Path, help="keep the numbers in this file, beside those of other versions")
    parser.add_argument("--write", type=Path, help="write the table to this file")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args()
    jobs = [(label, target) for label in LAUNCHES if args.kernels in label for target in args.targets]
    with multiprocessing.get_context("fork").Pool(args.jobs) as pool:
        found = dict(zip(jobs, pool.map(_measured, jobs, chunksize=1)))
    versions = kept(args.results, found) if args.results else {triton.__version__: found}
    page = PAGE.format(versions=" and ".join(versions), table=table(list(versions.values()), args.targets))
    print(page)
    if args.write:
        args.write.write_text(page)
    complaints = []
    for (label, target), value in found.items():
        if why := complaint(value, target, STACK_LIMIT.get((triton.__version__, target, label), 0)):
            complaints.append(f"{label}: {why}")
    for line in complaints:
        print(line, file=sys.stderr)
    return 1 if args.check and complaints else 0


if __name__ == "__main__":
    sys.exit(main())
