"""Blocks of every kind at small sizes, with their weights and inputs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from starflow_kernels import AffineSpec, BlockSpec, block_forward
from support.contract import with_gradients
from support.naive import angles

F64 = torch.float64
T = 5
BASE = BlockSpec(token_dim=3, channels=8, layers=2, heads=2, head_dim=4, kv_heads=2, mlp_dim=12)
TARFLOW = {"positions": T}
STARFLOW = {"affine": AffineSpec("softplus", 4.0), "rotary": "interleaved", "start": True, "final_norm": True}

# (spec, whether a condition is added, length of the text in front)
BLOCKS = {
    "tarflow": (TARFLOW, False, 0),
    "tarflow-flip": ({**TARFLOW, "flip": True}, True, 0),
    "tarflow-unit": ({**TARFLOW, "affine": AffineSpec("unit")}, True, 0),
    "tarflow-start-flip": ({**TARFLOW, "start": True, "flip": True}, True, 0),
    "tarflow-rms-clip": ({**TARFLOW, "norm": "rms_norm", "affine": AffineSpec("exp", 2.0)}, False, 0),
    "tarflow-swiglu": ({**TARFLOW, "mlp": "swiglu", "post_norm": True, "flip": True}, True, 0),
    "tarflow-text": ({**TARFLOW, "text_dim": 6, "flip": True}, True, 4),
    "starflow": (STARFLOW, False, 0),
    "starflow-flip": ({**STARFLOW, "flip": True}, False, 0),
    "starflow-text": ({**STARFLOW, "text_dim": 6}, False, 4),
    "starflow-text-flip-cond": ({**STARFLOW, "text_dim": 6, "flip": True}, True, 1),
    "starflow-without-its-text": ({**STARFLOW, "text_dim": 6}, False, 0),
    "starflow-grouped": ({**STARFLOW, "kv_heads": 1, "rotary": "half", "bias": False}, True, 0),
    "starflow-identity-first": ({**STARFLOW, "start": False, "flip": True}, True, 0),
    "starflow-all-norms": ({**STARFLOW, "qk_norm": True, "post_norm": True, "norm": "rms_norm"}, False, 0),
    "starflow-unit": ({**STARFLOW, "affine": AffineSpec("unit", 4.0), "qk_norm": True}, False, 0),
    "no-norm-no-position": ({"norm": "none", "bias": False, "final_norm": True}, True, 0),
    "adaptive": ({**TARFLOW, "qk_layer_norm": True, "adaptive": True, "transition_dim": 10, "flip": True}, True, 0),
    "adaptive-one-branch": ({**STARFLOW, "qk_layer_norm": True, "kv_heads": 1, "adaptive": True}, True, 0),
    "three-layers-swiglu": ({**STARFLOW, "layers": 3, "mlp": "swiglu", "kv_heads": 1, "bias": False}, False, 0),
}
# Blocks that the kernels on a GPU and the peers of the benchmarks take.
GPU_BLOCKS = {name: case for name, case in BLOCKS.items() if "adaptive" not in case[0]}
every_block = pytest.mark.parametrize("case", BLOCKS.values(), ids=BLOCKS.keys())


def block(case, B=2, tokens=T, copies=1, dtype=F64, **changes):
    """Return data, weights and spec of a case, and its context of copies * B different rows."""
    overrides, conditional, L = case
    spec = dataclasses.replace(BASE, **{**overrides, **changes})
    if spec.positions:
        spec = dataclasses.replace(spec, positions=tokens)
    weights = {}
    for name, shape in spec.weight_shapes.items():
        scale = shape[1] ** -0.5 if len(shape) == 2 and name != "pos_embed" else 0.3
        if name == "proj_out.weight":
            scale *= 0.1  # TarFlow's sigma is exp of what is linear in the tokens: a wilder one explodes over T steps
        weights[name] = (torch.randn(shape, dtype=F64) * scale).to(dtype)
        if name.endswith("norm.weight") and spec.norm == "layer_norm":
            weights[name] += 1
    context = {}
    if conditional:
        context["cond"] = torch.randn(copies * B, spec.cond_dim, dtype=F64).to(dtype)
    if L:
        context["prefix"] = torch.randn(copies * B, L, spec.text_dim, dtype=F64).to(dtype)
    if spec.rotary != "none":
        context |= angles(L + tokens, spec.head_dim, torch.promote_types(dtype, torch.float32))
    x = torch.randn(B, tokens, spec.token_dim, dtype=F64)
    return x.to(torch.promote_types(dtype, torch.float32)), weights, spec, context


def of_tensors(flow, x, w, spec, context):
    """Return flow(x, w, spec, **context) as a function of every tensor with a gradient, and these tensors."""
    inputs = [n for n in ("cond", "prefix") if n in context]

    def function(x, *values):
        weights, changed = dict(zip(w, values)), dict(zip(inputs, values[len(w) :]))
        return flow(x, weights, spec, **{**context, **changed})

    return function, [x, *w.values(), *(context[n] for n in inputs)]


def passes(x, w, spec, context, **options):
    """Return outputs of block_forward and the gradients of every tensor, for fixed gradients of the outputs."""
    function, tensors = of_tensors(lambda *a, **c: block_forward(*a, **c, **options), x, w, spec, context)
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(shape, generator=generator, dtype=F64) for shape in (x.shape, x.shape[:1])]
    return with_gradients(function, tensors, seeds)


SIZES = {"token_dim": 12, "channels": 64, "layers": 2, "heads": 4, "head_dim": 16, "kv_heads": 4, "mlp_dim": 160}
EVERYTHING = {"qk_norm": True, "post_norm": True, "norm": "rms_norm", "mlp": "swiglu", "kv_heads": 2, "bias": False}
WIDE_SPECS = {
    "tarflow": BlockSpec(**SIZES, flip=True),
    "starflow-text": BlockSpec(**SIZES, **STARFLOW, text_dim=24),
    "everything": BlockSpec(**{**SIZES, **STARFLOW, **EVERYTHING, "rotary": "half"}),
    "odd": BlockSpec(**{**SIZES, "token_dim": 5, "channels": 51, "head_dim": 24, "mlp_dim": 301}),
}
every_wide_spec = pytest.mark.parametrize("spec", WIDE_SPECS.values(), ids=WIDE_SPECS.keys())


def _normal(*shape):
    return torch.randn(shape, dtype=torch.float32, device="cpu")


def tame_block(spec, B, T, text=0, dtype=torch.float32, copies=1):
    """Return data or noise, weights and context of a block whose tokens neither grow nor shrink much."""
    weights = {}
    for name, shape in spec.weight_shapes.items():
        scale = shape[1] ** -0.5 if len(shape) == 2 and name != "pos_embed" else 0.2
        weights[name] = (_normal(*shape) * scale * (0.1 if name == "proj_out.weight" else 1)).to(dtype)
        if name.endswith("norm.weight") and spec.norm == "layer_norm":
            weights[name] += 1
    context = {"cond": _normal(copies * B, spec.channels).to(dtype)}
    text = text if spec.text_dim else 0
    if text:
        context["prefix"] = _normal(copies * B, text, spec.text_dim).to(dtype)
    if spec.rotary != "none":
        context |= angles(text + T, spec.head_dim, torch.float32)
    return _normal(B, T, spec.token_dim), weights, context


def rows(context, which):
    """Return the context of the rows `which`."""
    return {name: t if name in ("cos", "sin") else t[which] for name, t in context.items()}
