"""block_forward and block_inverse: every error names its argument."""

from __future__ import annotations

import math

import pytest
import torch
from support.blocks import BLOCKS, T, block
from support.naive import angles

from starflow_kernels import block_forward, block_inverse

# (block, changed arguments, error, message); `weights` lists the changed weights, None removes one
SHARED_ERRORS = [
    ("tarflow", {"weights": {"proj_in.bias": None}}, ValueError, r"weights: missing \['proj_in.bias'\]"),
    ("tarflow", {"weights": {"lora": torch.zeros(1)}}, ValueError, r"weights: .*unknown \['lora'\]"),
    ("tarflow", {"weights": {"proj_in.bias": torch.zeros(7)}}, ValueError, r"weights\['proj_in.bias'\]"),
    ("tarflow", {"weights": {"proj_in.bias": 1}}, TypeError, r"weights\['proj_in.bias'\]"),
    ("tarflow", {"weights": {"proj_in.bias": torch.zeros(8)}}, TypeError, "weights: expected one dtype"),
    ("tarflow", {"cond": torch.zeros(2, 7)}, ValueError, r"cond: expected shape \(2, 8\)"),
    ("tarflow", {"cond": torch.zeros(1, 8)}, ValueError, "cond: expected shape"),
    ("tarflow", {"prefix": torch.zeros(2, 4, 6)}, ValueError, "prefix: given, but the block has text_dim=0"),
    ("starflow-text", {"prefix": torch.zeros(2, 4, 5)}, ValueError, r"prefix: expected shape \(2, L, 6\)"),
    ("starflow-text", {"prefix": torch.zeros(1, 4, 6)}, ValueError, "prefix: expected shape"),
    ("starflow", {"cos": None, "sin": None}, ValueError, "cos, sin: needed with rotary"),
    ("starflow", {"sin": None}, ValueError, "cos, sin: needed"),
    ("tarflow", angles(T, 4), ValueError, "cos, sin: needed .* rotary='none'"),
    ("starflow", angles(T + 1, 4), ValueError, r"cos: expected shape \(5, 2\)"),
    ("starflow", {"sin": torch.zeros(T, 3)}, ValueError, r"sin: expected shape \(5, 2\)"),
]
FORWARD_ERRORS = [
    ("starflow", angles(T, 4) | {"cos": torch.zeros(T, 2, requires_grad=True)}, ValueError, "cos, sin: .* no gradient"),
    ("tarflow", {"x": 0}, TypeError, "x: expected a tensor"),
    ("tarflow", {"x": torch.zeros(2, T, 4)}, ValueError, r"x: expected shape \(B, T, 3\)"),
    ("tarflow", {"x": torch.zeros(2, 4, 3)}, ValueError, "x or z: 4 tokens, but the learned position table has 5"),
    ("tarflow", {"logdet": "all"}, ValueError, "logdet='all'"),
    ("tarflow", {"dropout": 1.0}, ValueError, "dropout=1.0"),
]
INVERSE_ERRORS = [
    ("tarflow", {"z": torch.zeros(2, T)}, ValueError, "z: expected shape"),
    ("tarflow", {"solver": "jacobi"}, TypeError, "solver"),
    ("tarflow", {"guidance": math.nan}, ValueError, r"guidance: 10 of 10 values are not finite"),
    ("tarflow", {"guidance": math.inf}, ValueError, r"guidance: 10 of 10 values are not finite"),
    ("tarflow", {"guidance": True}, TypeError, "guidance: expected a number or a tensor, got bool"),
    ("tarflow", {"guidance": torch.tensor(True)}, TypeError, "guidance: expected a number or a tensor, got Tensor"),
    ("tarflow", {"z": torch.full((2, T, 3), math.nan)}, ValueError, "z: 30 of 30 values are not finite"),
    ("tarflow", {"z": torch.full((2, T, 3), math.inf)}, ValueError, "z: 30 of 30 values are not finite"),
    ("tarflow", {"cond": torch.full((2, 8), math.nan)}, ValueError, "cond: 16 of 16 values are not finite"),
    ("tarflow", {"z": torch.zeros(2, 0, 3)}, ValueError, r"z: expected shape \(B, T, 3\), got \(2, 0, 3\)"),
    ("tarflow", {"rule": "cfg"}, ValueError, "rule='cfg'"),
    ("tarflow", {"quantize": "int4"}, ValueError, "quantize='int4': expected one of 'none', 'int8', 'fp8'"),
    ("tarflow", {"temperature": 0.0, "guidance": 1.0}, ValueError, "temperature=0.0"),
    ("tarflow", {"temperature": 0.5}, ValueError, "temperature=0.5 .*needs guidance"),
    ("tarflow", {"guidance": "strong"}, TypeError, "guidance: expected a number or a tensor"),
    ("tarflow", {"guidance": torch.zeros(4)}, ValueError, "guidance: shape"),
    ("tarflow", {"guidance": 1.0, "cond": torch.zeros(2, 8)}, ValueError, r"cond: expected shape \(4, 8\)"),
]


def check_error(op, data, name, change, error, message):
    x, w, spec, context = block(BLOCKS[name])
    weights = {n: t for n, t in {**w, **change.get("weights", {})}.items() if t is not None}
    with pytest.raises(error, match=message):
        op(**{data: x, "spec": spec, **context, **change, "weights": weights})


@pytest.mark.parametrize("op", [block_forward, block_inverse])
def test_weights_and_spec_of_another_kind(op):
    x, w, spec, context = block(BLOCKS["tarflow"])
    with pytest.raises(TypeError, match="weights: expected tensors by name, got list"):
        op(x, list(w.values()), spec, **context)
    with pytest.raises(TypeError, match="spec: expected a BlockSpec, got str"):
        op(x, w, spec.to_json(), **context)


@pytest.mark.parametrize("name, change, error, message", SHARED_ERRORS + FORWARD_ERRORS)
def test_forward_errors_name_the_argument(name, change, error, message):
    check_error(block_forward, "x", name, change, error, message)


@pytest.mark.parametrize("name, change, error, message", SHARED_ERRORS + INVERSE_ERRORS)
def test_inverse_errors_name_the_argument(name, change, error, message):
    check_error(block_inverse, "z", name, change, error, message)
