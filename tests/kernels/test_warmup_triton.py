"""warmup runs the Triton kernels of a call: TRITON_INTERPRET=1 pytest tests/kernels/test_warmup_triton.py."""

from __future__ import annotations

import importlib

import pytest
import torch
from support.backends import require_interpreter

from starflow_kernels import AffineSpec, affine_flow, flow_head, warmup

require_interpreter()


def meta(*shape, gradient=False, dtype=torch.float16):
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=gradient)


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that are launched, with the dtype of their first tensor."""
    names = []
    module = importlib.import_module("starflow_kernels.flow_head.triton")
    for name in ("flow_head", "flow_head_backward"):
        run = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, name=name, run=run: names.append(name) or run(*args))
    return names


@pytest.mark.parametrize("gradient", [False, True])
def test_runs_what_the_call_needs(launched, gradient):
    tensors = [meta(1, 5, 3, gradient=gradient), meta(1, 5, 8), meta(6, 8), meta(6), meta(8)]
    with torch.no_grad():
        warmup(flow_head, *tensors, AffineSpec("softplus", 4.0), shift=True)
    assert launched == ["flow_head", "flow_head_backward"][: 1 + gradient]


def test_says_why_triton_cannot_run_the_call():
    with pytest.raises(ValueError, match="cannot run affine_flow: it takes float32 and narrower"):
        warmup(affine_flow, meta(1, 2, 3, dtype=torch.float64), meta(1, 2, 6, dtype=torch.float64))
