"""What each Triton kernel takes of a chip, read out of the compiled code; needs no GPU.

python -m benchmarks.triton_resources

Every kernel is compiled for every target as it is launched: pointers on 16 bytes, sizes that 16 divides.
"""

from __future__ import annotations

import inspect
import itertools
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from starflow_kernels.affine_flow import triton as affine_flow
from starflow_kernels.attention_flow import triton as attention_flow
from starflow_kernels.causal_attention import triton as causal_attention
from starflow_kernels.flow_head import triton as flow_head
from starflow_kernels.triton_blocks import blocks

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}


class Launch(NamedTuple):
    """A kernel, the types of its run-time arguments, and its compile-time ones, num_warps and num_stages among them."""

    kernel: triton.JITFunction
    types: dict[str, str]
    constants: dict


class Resources(NamedTuple):
    """Registers a thread, bytes of stack a thread (spills), bytes of shared memory a block."""

    registers: int
    stack: int
    shared: int


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


def _flow_head() -> dict[str, Launch]:
    names = ("x", "h", "weight", "bias", "norm_weight", "z", "grad_z", "grad_x", "grad_h")
    types = {name: "*bf16" for name in names} | {"grad_raw": "*fp32", "scaled": "*fp32", "logdet": "*fp32"}
    types |= {"T": "i32", "C": "i32", "D": "i32", "clip": "fp32", "share": "fp32", "grad_logdet": "*fp32"}
    options = {
        "SCALE": "softplus",
        "CLIPPED": True,
        "BIAS": True,
        "NORM": True,
        "SHIFT": True,
        "FLIP": True,
        "SUM": True,
    }
    launches = {}
    for D in (4, 64, 128, 256):
        constants = {**options, **flow_head.config(D, 1024)}
        launches[f"flow_head, D = {D}"] = Launch(flow_head.forward_kernel, types, constants)
        constants = {**constants, "HAS_Z": True, "HAS_LOGDET": True}
        launches[f"flow_head_backward, D = {D}"] = Launch(flow_head.backward_kernel, types, constants)
    return launches


STRIDES = tuple(f"{name}_{of}" for name in "qkvg" for of in ("row", "token", "head"))
HEADS = {"T", "H", "group", "window", *STRIDES}


def attention(kernel: str, chip: str, dtype: str, d: int, rotary: str, window: bool) -> Launch:
    """A kernel of causal attention, heads of d values, with the blocks of `chip`."""
    names = ("x", "q", "k", "v", "out", "turned", "grad_out", "grad_q", "grad_k", "grad_v")
    types = {name: f"*{dtype}" for name in names} | dict.fromkeys(("lse", "delta", "grad_lse"), "*fp32")
    types |= dict.fromkeys(HEADS, "i32") | {"factor": "fp32", "scale": "fp32"}
    angle = "constexpr" if rotary == "none" else "*fp32"
    half = causal_attention.half_tile(d)
    constants = {"WINDOW": window, "HEAD": d, "HALF": half, "ROTARY": rotary}
    constants |= {"cos": None, "sin": None} if rotary == "none" else {}
    if kernel in ("turn", "delta"):
        constants |= {"HAS_LSE": True, "BLOCK_M": 32, "BLOCK": 64}
    else:
        constants |= blocks("causal_attention", kernel, chip, 2 if dtype == "bf16" else 4, 2 * half)
    return Launch(getattr(causal_attention, f"{kernel}_kernel"), types | {"cos": angle, "sin": angle}, constants)


def flow(kernel: str, chip: str, dtype: str, d: int, D: int, rotary: str = "interleaved", window: bool = True):
    """A kernel of attention_flow, heads of d and tokens of D values, with the blocks of `chip`."""
    names = ("x", "q", "k", "v", "weight", "bias", "z", "out", "grad_z", "grad_x", "grad_q", "grad_k", "grad_v")
    types = {name: f"*{dtype}" for name in names} | dict.fromkeys(HEADS | {"D", "P"}, "i32")
    types |= dict.fromkeys(("cos", "sin", "logdet", "lse", "delta", "grad_logdet", "grad_raw", "grad_lse"), "*fp32")
    types |= dict.fromkeys(("factor", "scale", "clip", "share"), "fp32")
    half = causal_attention.half_tile(d)
    constants = {"WINDOW": window, "HEAD": d, "HALF": half, "ROTARY": rotary, "SCALE": "softplus", "CLIPPED": True}
    constants |= dict.fromkeys(("BIAS", "SHIFT", "FLIP", "SUM", "HAS_Z", "HAS_LOGDET", "HAS_LSE"), True)
    tile = max(16, triton.next_power_of_2(D))
    constants |= {"BLOCK_D": tile, "BLOCK_P": 2 * tile}
    source = "forward" if kernel == "raw" else kernel
    constants |= blocks("attention_flow", source, chip, 2 if dtype == "bf16" else 4, 2 * half)
    return Launch(getattr(attention_flow, f"{kernel}_kernel"), types, constants)


def _by_chip(launch: Callable[..., Launch], *args) -> dict[str, Launch]:
    """The launch on each target, with its own blocks."""
    return {name: launch(args[0], name if name[:2] == "sm" else "default", *args[1:]) for name in TARGETS}


def _causal_attention() -> dict[str, dict[str, Launch]]:
    kernels, sizes = ("forward", "queries", "keys", "turn", "delta"), (16, 32, 64, 80, 128, 256)
    return {
        f"causal_attention {kernel}, {dtype}, d = {d}": _by_chip(attention, kernel, dtype, d, "interleaved", True)
        for kernel, dtype, d in itertools.product(kernels, ("bf16", "fp32"), sizes)
    }


def _attention_flow() -> dict[str, dict[str, Launch]]:
    kernels, sizes = ("forward", "raw", "queries", "keys"), {"bf16": (16, 64, 80, 128), "fp32": (16, 64)}
    return {
        f"attention_flow {kernel}, {dtype}, d = {d}, D = {D}": _by_chip(flow, kernel, dtype, d, D)
        for kernel, (dtype, D) in itertools.product(kernels, (("bf16", 64), ("fp32", 32)))
        for d in sizes[dtype]
    }


LAUNCHES = {**_affine_flow(), **_flow_head(), **_causal_attention(), **_attention_flow()}


def compiled(launch: Launch, target: GPUTarget):
    """The compiled kernel."""
    names = list(inspect.signature(launch.kernel.fn).parameters)
    options = {name: value for name, value in launch.constants.items() if name not in names}
    signature = {name: launch.types.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in launch.constants.items() if name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name][0] == "*" or name in ("T", "C", "D", *STRIDES)
    }
    source = ASTSource(launch.kernel, signature, constants, aligned)
    return triton.compile(source, target=target, options={"enable_fp_fusion": True, **options})


def resources(launch: Launch, name: str) -> Resources:
    """Those of a kernel on the target `name`."""
    kernel = compiled(launch, TARGETS[name])
    if "cubin" not in kernel.asm:
        found = {key: int(value) for key, value in re.findall(r"\.(\w+): +(\d+)", kernel.asm["amdgcn"])}
        return Resources(found["vgpr_count"], found["private_segment_fixed_size"], kernel.metadata.shared)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = dict(re.findall(r"(REG|STACK|SHARED):(\d+)", text))
    return Resources(int(found["REG"]), int(found["STACK"]), kernel.metadata.shared)


def main() -> None:
    print(f"Triton {triton.__version__}: registers / stack / shared memory\n")
    print("| kernel | " + " | ".join(TARGETS) + " |\n|---|" + "---|" * len(TARGETS))
    for label, launch in LAUNCHES.items():
        chosen = launch if isinstance(launch, dict) else dict.fromkeys(TARGETS, launch)
        found = (resources(chosen[name], name) for name in TARGETS)
        print(f"| {label} | " + " | ".join(f"{r.registers} / {r.stack} / {r.shared}" for r in found) + " |", flush=True)


if __name__ == "__main__":
    main()
