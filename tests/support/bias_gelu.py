"""Inputs of bias_gelu, the same in plain torch, and the check of its error contract."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from starflow_kernels import bias_gelu
from support.contract import assert_within_contract, strided, with_gradients

F64 = torch.float64
every_part = pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])


def inputs(bias=True, B=2, T=5, C=7, dtype=F64) -> list[torch.Tensor]:
    """Return x (B, T, C), and a bias (C,)."""
    return [(3 * torch.randn(shape, dtype=F64)).to(dtype) for shape in ((B, T, C), (C,))[: 1 + bias]]


def op(backend):
    """Return the op as a function of tensors with a list of outputs."""
    return lambda *t: [bias_gelu(*t, backend=backend)]


def naive(x, bias=None):
    """Compute in the dtype of x with torch."""
    return [F.gelu(x if bias is None else (x + bias).to(x.dtype))]


def check_contract(tensors, backend):
    """Check output and gradients."""
    seeds = [torch.randn_like(tensors[0])]
    found = with_gradients(op(backend), [strided(t) for t in tensors], seeds)
    plain, exact = (with_gradients(naive, given, seeds) for given in (tensors, [t.double() for t in tensors]))
    assert [t.dtype for t in found] == [tensors[0].dtype] + [t.dtype for t in tensors]
    for values in zip(found, plain, exact):
        assert_within_contract(*values)
