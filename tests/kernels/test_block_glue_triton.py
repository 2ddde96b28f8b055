"""Fused ops of a block in Triton: TRITON_INTERPRET=1 pytest tests/kernels/test_block_glue_triton.py."""

from __future__ import annotations

import functools

import pytest
import torch
from support.backends import require_interpreter
from support.blocks import BLOCKS, block, passes
from support.contract import assert_within_contract

from starflow_kernels import block_forward, block_params
from starflow_kernels._core import dispatch
from starflow_kernels.block import composed

require_interpreter()


@pytest.mark.parametrize("name", ["tarflow-flip", "starflow-all-norms"])
def test_error_contract(name, monkeypatch):
    monkeypatch.setattr(composed, "_on_gpu", lambda x: True)
    wide = {"token_dim": 8, "channels": 48, "mlp_dim": 96, "layers": 1}
    x, w, spec, context = block(BLOCKS[name], B=2, tokens=17, dtype=torch.float32, **wide)
    found, plain = (passes(x, w, spec, context, backend=name) for name in ("triton", "reference"))
    doubled = {n: t.double() for n, t in w.items()}, spec, {n: t.double() for n, t in context.items()}
    for values in zip(found, plain, passes(x.double(), *doubled, backend="reference")):
        assert_within_contract(*values)


@pytest.mark.parametrize(
    "op", [functools.partial(block_forward, logdet="none"), block_params], ids=["forward", "params"]
)
@pytest.mark.parametrize("name", ["tarflow-flip", "starflow-all-norms"])
def test_no_gradient_takes_the_kernels_on_a_gpu(op, name, monkeypatch):
    """The reference would keep the attention scores of all pairs of tokens."""
    monkeypatch.setattr(composed, "_on_gpu", lambda x: True)
    ran, run = {}, dispatch.run
    monkeypatch.setattr(
        dispatch, "run", lambda op, *args: ran.update({op: dispatch.choose(op, *args[1:])}) or run(op, *args)
    )
    x, w, spec, context = block(BLOCKS[name], B=2, tokens=17, dtype=torch.float32, channels=48, layers=1)
    with torch.no_grad():
        found, plain = (op(x, w, spec, **context, backend=name) for name in (None, "reference"))
        doubled = {n: t.double() for n, t in w.items()}, spec
        exact = op(x.double(), *doubled, **{n: t.double() for n, t in context.items()}, backend="reference")
    fused = ["causal_attention", "residual_norm", *(["bias_gelu"] if spec.mlp == "gelu" else [])]
    assert {name: ran.get(name) for name in fused} == dict.fromkeys(fused, "triton")
    for values in zip(*((v,) if isinstance(v, torch.Tensor) else v for v in (found, plain, exact))):
        assert_within_contract(*values)
