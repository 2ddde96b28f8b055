"""Every Triton kernel of the package in every shipped configuration, for `triton_resources` to compile."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from starflow_kernels._triton import rotary
from starflow_kernels._triton.tiles import blocks
from starflow_kernels.affine_flow import triton as affine_flow
from starflow_kernels.attention_flow import triton as attention_flow
from starflow_kernels.bias_gelu import triton as bias_gelu
from starflow_kernels.block.quantize import KINDS
from starflow_kernels.block.triton import head_kernels, sizes, step_kernels, sweep_kernels, sweeps, weights
from starflow_kernels.causal_attention import triton as causal_attention
from starflow_kernels.flow_head import triton as flow_head
from starflow_kernels.residual_norm import triton as residual_norm

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
STRIDES = tuple(f"{tensor}_{dimension}" for tensor in "qkvg" for dimension in ("row", "token", "head"))
HEADS = {"T", "H", "group", "window", *STRIDES}
# Head size -> compiled without a window, with one. Sizes cover each tile of heads, also filled in part.
WINDOWED = {16: (True,), 32: (False,), 64: (False, True), 80: (True,), 128: (False,), 256: (False, True)}
WIDTH = {"bf16": 2, "fp32": 4}


class Launch(NamedTuple):
    """A kernel and its arguments.

    Args:
        kernel: the Triton function.
        types: parameter -> Triton type, for run-time arguments.
        constants: compile-time arguments, and options such as num_warps and num_stages.
        sizes: run-time arguments that 16 divides, if the kernel is specialised by them.
    """

    kernel: triton.JITFunction
    types: dict[str, str]
    constants: dict
    sizes: tuple[str, ...] = ("T", "C", "D", *STRIDES)


Launches = dict[str, Launch | dict[str, Launch]]


def label(kernel: triton.JITFunction, *variant: str) -> str:
    """Return the name of a row: the kernel's name without "_kernel", and what distinguishes the configuration."""
    return ", ".join([kernel.__name__.removesuffix("_kernel"), *variant])


def _by_chip(launch: Callable[..., Launch], *args) -> dict[str, Launch]:
    """Return the launch for each target, with the block sizes of that target."""
    return {chip: launch(chip, *args) for chip in TARGETS}


def _affine_flow() -> Launches:
    options = {"SHIFT": True, "FLIP": True, **affine_flow.CONFIG}
    variants = {"softplus, clip": {"SCALE": "softplus", "CLIPPED": True}, "exp": {"SCALE": "exp", "CLIPPED": False}}
    sizes = {"T": "i32", "D": "i32", "clip": "fp32", "factor": "fp32"}
    tensors = {name: "*bf16" for name in ("x", "raw", "z", "grad_z", "grad_x", "grad_params")}
    types = {**tensors, **sizes, "logdet": "*fp32", "grad_logdet": "*fp32"}
    forward, backward = affine_flow.affine_flow_forward_kernel, affine_flow.affine_flow_backward_kernel
    launches = {}
    for variant, logdet in itertools.product(variants, ("sum", "none")):
        constants = {**options, **variants[variant], "SUM": logdet == "sum"}
        launches[label(forward, variant, logdet)] = Launch(forward, types, constants)
        constants = {**constants, "HAS_Z": True, "HAS_LOGDET": True}
        launches[label(backward, variant, logdet)] = Launch(backward, types, constants)
    types = {"partial": "*fp32", "logdet": "*fp32", "chunks": "i32", "factor": "fp32"}
    launches[label(affine_flow.logdet_sum_kernel)] = Launch(affine_flow.logdet_sum_kernel, types, {"BLOCK": 1024})
    return launches


def _flow_head() -> Launches:
    tensors = ("x", "h", "weight", "bias", "norm_weight", "z", "grad_z", "grad_x", "grad_h")
    others = {name: "*fp32" for name in ("grad_raw", "scaled", "logdet", "grad_logdet")}
    others |= {"T": "i32", "C": "i32", "D": "i32", "clip": "fp32", "share": "fp32"}
    options = {name: True for name in ("CLIPPED", "BIAS", "NORM", "SHIFT", "FLIP", "SUM")} | {"SCALE": "softplus"}

    def launch(chip: str, kernel: triton.JITFunction, name: str, dtype: torch.dtype, D: int) -> Launch:
        types = {tensor: f"*{name}" for tensor in tensors} | others
        constants = {**options, **flow_head.config(D, dtype, chip)}
        if kernel is flow_head.flow_head_backward_kernel:
            constants |= {"HAS_Z": True, "HAS_LOGDET": True}
        return Launch(kernel, types, constants, ("T", "C", "D") if D % 16 == 0 else ("T", "C"))

    launches = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        for D in (256,) if name == "fp16" else (4, 16, 32, 64, 128, 256):
            for kernel in (flow_head.flow_head_forward_kernel, flow_head.flow_head_backward_kernel):
                launches[label(kernel, name, f"D = {D}")] = _by_chip(launch, kernel, name, dtype, D)
    return launches


def _fused_ops() -> Launches:
    """Return the ops between the products of a block: bf16 or fp32 tensors, float32 weights."""
    tensors = ("x", "update", "total", "normed", "grad_total", "grad_normed", "grad_x", "out", "grad")
    others = dict.fromkeys(("weight", "bias", "partial"), "*fp32") | {"N": "i32", "C": "i32", "programs": "i32"}
    aligned, launches = ("C",), {}
    forward, backward = residual_norm.residual_norm_forward_kernel, residual_norm.residual_norm_backward_kernel
    for dtype, C in itertools.product(("bf16", "fp32"), (64, 768, 1024, 3072, 8192)):
        types = {name: f"*{dtype}" for name in tensors} | others | {"eps": "fp32"}
        for kind in ("layer_norm", "rms_norm"):
            options = {"KIND": kind, "WEIGHT": True, "BIAS": kind == "layer_norm", **residual_norm.config(C)}
            variant = dtype, kind, f"C = {C}"
            launches[label(forward, *variant)] = Launch(forward, types, {**options, "UPDATE": True}, aligned)
            launches[label(backward, *variant)] = Launch(backward, types, {**options, "HAS_TOTAL": True}, aligned)
    for dtype in ("bf16", "fp32"):
        types, options = {name: f"*{dtype}" for name in tensors} | others, {"BIAS": True, **bias_gelu.CONFIG}
        for kernel in (bias_gelu.bias_gelu_forward_kernel, bias_gelu.bias_gelu_backward_kernel):
            launches[label(kernel, dtype)] = Launch(kernel, types, options, aligned)
    return launches


def step(kernel: str, dtype: str, d: int, D: int, options: dict, quantize: str = "none") -> Launch:
    """Return the launch of a kernel of a sampling step, for heads of d and tokens of D values.

    Args:
        kernel: "qkv", "attend", "product", "up", "embed" or "head".
        dtype: "bf16" or "fp32", of the network.
        d: values per head.
        D: values per token.
        options: compile-time arguments that vary: NORM, POST, FIRST, GATED, PDL.
        quantize: "none", "int8" or "fp8".
    """
    learned = ("weight", "bias", "norm_weight", "norm_bias", "post", "head_norms", "gate", "gate_bias", "table")
    stored = (*learned, "in_weight", "in_bias", "k_cache", "v_cache", "hidden", "attended")
    states = ("h", "h_next", "h_in", "residual", "cos", "sin", "scale", "q", "cond", "z", "x", "guidance", "log_scales")
    splits = ("split_out", "split_max", "split_sum", "partial", "statistics")
    types = dict.fromkeys(stored, f"*{dtype}") | dict.fromkeys((*states, *splits), "*fp32")
    types |= dict.fromkeys(("position", "known_tokens", "tickets"), "*i32")
    integers = ("rows", "n", "C", "D", "slots", "splits", "width", "samples", "stride", "cond_stride", "T", "prefix")
    types |= dict.fromkeys(integers, "i32") | {"clip": "fp32"}
    if kernel == "product":
        types["x"] = f"*{dtype}"
    constants, scales = {"H": 16, "KV": 4, "HEAD": d}, ("weight_scale", "gate_scale")
    if quantize == "none":
        constants |= dict.fromkeys(scales)
    else:
        types |= dict.fromkeys(("weight", "gate"), {"int8": "*i8", "fp8": "*u8"}[quantize])
        types |= dict.fromkeys(scales, "*fp32")
    constants |= {"PDL": False, "stop": None, "BLOCK_M": sizes.BLOCK_M}
    constants |= {"SPLIT": sizes.SPLIT}
    constants |= {"DTYPE": {"bf16": tl.bfloat16, "fp32": tl.float32}[dtype]}
    whole, part = sizes.WHOLE_TOKEN >= D, sizes.token_part(D)
    constants |= {"BLOCK_D": part if kernel in ("head", "embed") else sizes.tile(d), "WHOLE": whole, **options}
    constants |= dict.fromkeys(("BIAS", "QK_NORM", "ROTARY", "CLIPPED", "START", "TABLE", "COND"), True)
    constants |= {"BRANCHES": 2, "RULE": "starflow", "SCALE": "softplus", "PARTS": 12}
    constants |= {"PAIRS": rotary.half_tile(d), "TILES": 0 if options["FIRST"] else sizes.TILES}
    constants |= sizes.config(kernel, WIDTH[dtype], D, d, quantize != "none")
    module = head_kernels if kernel in ("head", "embed") else step_kernels
    return Launch(
        getattr(module, f"block_{kernel}_kernel"),
        types,
        constants,
        ("C", "D", "slots", "width", "stride", "cond_stride"),
    )


def quantization(dtype: str, kind: str) -> Launch:
    """Return the launch of the kernel that rounds weights of `dtype` to "int8" or "fp8"."""
    types = {"weight": f"*{dtype}", "values": {"int8": "*i8", "fp8": "*u8"}[kind], "scales": "*fp32", "K": "i32"}
    constants = {"LARGEST": KINDS[kind][1], "FACTOR": 1.0, "BLOCK": weights.BLOCK, "num_warps": weights.WARPS}
    return Launch(weights.block_quantize_kernel, types, constants, ("K",))


def _step() -> Launches:
    """Return every kernel of a step: both dtypes, extreme sizes of heads and tokens, norms where they matter."""
    launches, plain = {}, {"NORM": "layer_norm", "POST": False, "FIRST": True, "GATED": False}
    normed = {"NORM": "rms_norm", "POST": True, "FIRST": False, "GATED": True}
    for dtype in ("bf16", "fp32"):
        for variant, options in (("plain", plain), ("post-norms, gated", normed)):
            for d in (64, 256):
                launches[f"block_qkv, {dtype}, d = {d}, {variant}"] = step("qkv", dtype, d, 64, options)
            launches[f"block_up, {dtype}, {variant}"] = step("up", dtype, 64, 64, options)
        for d in (64, 256):
            launches[f"block_attend, {dtype}, d = {d}"] = step("attend", dtype, d, 64, plain)
        launches[f"block_product, {dtype}"] = step("product", dtype, 64, 64, plain)
        widest = sizes.WHOLE_TOKEN
        for kernel, D in (("embed", widest), ("head", 12), ("head", 64), ("head", widest), ("head", 768)):
            launches[f"block_{kernel}, {dtype}, D = {D}"] = step(kernel, dtype, 64, D, normed)
    for dtype, kind in (("bf16", "int8"), ("bf16", "fp8"), ("fp32", "fp8")):
        for kernel in ("qkv", "up", "product"):
            launches[f"block_{kernel}, {dtype}, {kind} weights"] = step(kernel, dtype, 64, 64, normed, kind)
        launches[f"block_quantize, {dtype} to {kind}"] = quantization(dtype, kind)
    for kernel in ("qkv", "up", "product", "head"):
        early, late = (step(kernel, "bf16", 64, 64, {**normed, "PDL": pdl}) for pdl in (True, False))
        early.constants["launch_pdl"] = True
        by_chip = {chip: early if chip in ("sm_90", "sm_100") else late for chip in TARGETS}
        launches[f"block_{kernel}, bf16, dependent launch"] = by_chip
    return launches


def sweep(kernel: str, dtype: str, d: int, D: int, neighbours: int = 0) -> Launch:
    """Return the launch of a kernel of a Jacobi sweep, for heads of d and tokens of D values.

    Args:
        kernel: "qkv", "attend", "product", "up", "embed", "head" or "settle".
        dtype: "bf16" or "fp32", of the network.
        d: values per head.
        D: values per token.
        neighbours: tokens whose moves the linear model takes, 0 for plain sweeps.
    """
    options = {"NORM": "rms_norm", "POST": True, "FIRST": False, "GATED": True}
    like = step(kernel if kernel != "settle" else "head", dtype, d, D, options)
    counters = ("done", "single", "passes", "fallbacks", "failed", "sweeps", "stop", "learned", "offsets")
    types = like.types
    floats = ("y", "change", "move", "size", "bound", "tol", "solve_residual", *sweeps.NEWTON)
    types |= dict.fromkeys(floats, "*fp32") | dict.fromkeys(counters, "*i32") | {"inputs": "i32", "start": f"*{dtype}"}
    constants = {name: value for name, value in like.constants.items() if name != "stop"}
    if kernel in ("embed", "head", "attend"):
        constants |= sweeps.config(kernel, WIDTH[dtype], D, d)
    if kernel == "settle":
        inputs = neighbours * D
        constants |= {"WINDOW": 64, "SLIDE": True, "BLOCK_W": 64, **sweeps.model_options(inputs, D)}
        if not neighbours:
            constants |= dict.fromkeys(("offsets", *sweeps.NEWTON))
            types = {name: kind for name, kind in types.items() if name not in ("offsets", *sweeps.NEWTON)}
    shared = kernel in ("qkv", "up", "product")
    function = like.kernel if shared else getattr(sweep_kernels, f"block_sweep_{kernel}_kernel")
    return Launch(function, types, constants, ("C", "D", "slots", "width", "n", "cond_stride"))


def _sweep() -> Launches:
    launches = {}
    for dtype in ("bf16", "fp32"):
        for d in (64, 256):
            launches[f"block_qkv, sweep, {dtype}, d = {d}"] = sweep("qkv", dtype, d, 64)
        for d in (64, 256):
            launches[f"block_sweep_attend, {dtype}, d = {d}"] = sweep("attend", dtype, d, 64)
        for kernel in ("up", "product"):
            launches[f"block_{kernel}, sweep, {dtype}"] = sweep(kernel, dtype, 64, 64)
        launches[f"block_sweep_embed, {dtype}"] = sweep("embed", dtype, 64, 64)
        for D in (12, sizes.WHOLE_TOKEN):
            launches[f"block_sweep_head, {dtype}, D = {D}"] = sweep("head", dtype, 64, D)
    launches["block_sweep_settle, D = 256"] = sweep("settle", "fp32", 64, 256)
    for D in (12, 32, 64, 192):
        launches[f"block_sweep_settle, 2 neighbours, D = {D}"] = sweep("settle", "fp32", 64, D, 2)
    return launches


def _rotary_constants(d: int, kind: str, window: bool) -> dict:
    return {"WINDOW": window, "HEAD": d, "HALF": rotary.half_tile(d), "ROTARY": kind}


def attention(chip: str, kernel: str, dtype: str, d: int, window: bool) -> Launch:
    """Return the launch of a kernel of causal attention on `chip`, for heads of d values."""
    tensors = ("x", "q", "k", "v", "out", "rotated", "grad_out", "grad_q", "grad_k", "grad_v")
    types = {name: f"*{dtype}" for name in tensors} | dict.fromkeys(("lse", "delta", "grad_lse", "cos", "sin"), "*fp32")
    types |= dict.fromkeys(HEADS, "i32") | {"factor": "fp32", "scale": "fp32"}
    constants = _rotary_constants(d, "interleaved", window)
    if kernel in ("apply_rotary", "undo_rotary"):
        return Launch(getattr(rotary, f"{kernel}_kernel"), types, {**constants, "BLOCK": 64})
    if kernel == "delta":
        constants |= {"HAS_LSE": True, "BLOCK_M": 32}
    else:
        constants |= blocks("causal_attention", kernel, chip, WIDTH[dtype], 2 * rotary.half_tile(d))
    return Launch(getattr(causal_attention, f"causal_attention_{kernel}_kernel"), types, constants)


def flow(chip: str, kernel: str, dtype: str, d: int, D: int, window: bool) -> Launch:
    """Return the launch of a kernel of attention_flow on `chip`, for heads of d and tokens of D values."""
    tensors = ("x", "q", "k", "v", "weight", "bias", "z", "out", "grad_z", "grad_x", "grad_q", "grad_k", "grad_v")
    types = {name: f"*{dtype}" for name in tensors} | dict.fromkeys(HEADS | {"D", "P"}, "i32")
    types |= dict.fromkeys(("cos", "sin", "logdet", "lse", "delta", "grad_logdet", "grad_raw", "grad_lse"), "*fp32")
    types |= dict.fromkeys(("factor", "scale", "clip", "share"), "fp32")
    constants = _rotary_constants(d, "interleaved", window) | {"SCALE": "softplus"}
    constants |= dict.fromkeys(("CLIPPED", "BIAS", "SHIFT", "FLIP", "SUM", "HAS_Z", "HAS_LOGDET", "HAS_LSE"), True)
    tile = max(16, triton.next_power_of_2(D))
    constants |= {"BLOCK_D": tile, "BLOCK_P": 2 * tile}
    # The kernel of the raw gradients has the block sizes of the forward pass.
    like = "forward" if kernel == "raw" else kernel
    constants |= blocks("attention_flow", like, chip, WIDTH[dtype], 2 * rotary.half_tile(d))
    return Launch(getattr(attention_flow, f"attention_flow_{kernel}_kernel"), types, constants)


def _causal_attention() -> Launches:
    cases = {kernel: WINDOWED for kernel in ("forward", "queries", "keys")}
    small = {32: (False,), 80: (True,), 256: (False,)}
    cases |= {kernel: small for kernel in ("apply_rotary", "undo_rotary", "delta")}
    launches = {}
    for kernel, dtype in itertools.product(cases, ("bf16", "fp32")):
        name = kernel if kernel.endswith("rotary") else f"causal_attention_{kernel}"
        for d, windows in cases[kernel].items():
            for window in windows:
                row = f"{name}, {dtype}, d = {d}{', window' if window else ''}"
                launches[row] = _by_chip(attention, kernel, dtype, d, window)
    return launches


def _attention_flow() -> Launches:
    launches = {}
    types = (("bf16", 64, 128), ("fp32", 32, 64))
    for kernel, (dtype, D, widest) in itertools.product(("forward", "raw", "queries", "keys"), types):
        for d, windows in WINDOWED.items():
            for window in windows if d <= widest else ():
                row = f"attention_flow_{kernel}, {dtype}, d = {d}, D = {D}{', window' if window else ''}"
                launches[row] = _by_chip(flow, kernel, dtype, d, D, window)
    return launches


# Row of the table -> its launch, or the launch for each target where block sizes differ.
LAUNCHES: Launches = {
    **_affine_flow(),
    **_flow_head(),
    **_fused_ops(),
    **_step(),
    **_sweep(),
    **_causal_attention(),
    **_attention_flow(),
}
