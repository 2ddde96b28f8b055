"""Fused ops of a block in Triton: TRITON_INTERPRET=1 pytest tests/kernels/test_block_glue_triton.py."""

from __future__ import annotations

import pytest
import torch
from support.backends import require_interpreter
from support.blocks import BLOCKS, block, passes
from support.contract import assert_within_contract

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
