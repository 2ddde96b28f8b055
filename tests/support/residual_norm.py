"""Inputs of residual_norm, the same in plain torch, and the check of its error contract."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from starflow_kernels import residual_norm
from support.contract import assert_within_contract, strided, with_gradients

F64 = torch.float64
every_kind = pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
# residual, weight, bias
PARTS = [(True, True, True), (False, True, True), (True, True, False), (True, False, False), (False, False, True)]
every_part = pytest.mark.parametrize("parts", PARTS, ids=str)


def inputs(B=2, T=5, C=7, dtype=F64) -> list[torch.Tensor]:
    """Return x (B, T, C), residual (B, T, C), weight (C,) and bias (C,)."""
    return [torch.randn(shape, dtype=F64).to(dtype) for shape in ((B, T, C), (B, T, C), (C,), (C,))]


def only(parts, tensors) -> list[torch.Tensor]:
    """Return x and the tensors whose part is given."""
    return [t for there, t in zip((True, *parts), tensors) if there]


def spread(parts, tensors) -> list[torch.Tensor | None]:
    """Return x, residual, weight and bias, with None for parts that are not given."""
    tensors = iter(tensors)
    return [next(tensors) if there else None for there in (True, *parts)]


def op(parts, kind, backend, **options):
    """Return the op as a function of the tensors that are given."""
    return lambda *t: residual_norm(*spread(parts, t), kind=kind, backend=backend, **options)


def naive(parts, kind, eps=None):
    """Return torch's layer_norm or rms_norm by hand; the norm is in float32 or wider, the outputs in the dtype of x."""

    def run(*tensors):
        x, residual, weight, bias = spread(parts, tensors)
        total = x if residual is None else (x + residual).to(x.dtype)
        wide = torch.promote_types(x.dtype, torch.float32)
        if kind == "layer_norm":
            w, b = (None if t is None else t.to(wide) for t in (weight, bias))
            return total, F.layer_norm(total.to(wide), x.shape[-1:], w, b, 1e-5 if eps is None else eps).to(x.dtype)
        y = total.to(wide)
        y = y / (y.pow(2).mean(-1, keepdim=True) + (1e-6 if eps is None else eps)).sqrt()
        y = y if weight is None else y * (1 + weight.to(wide))
        return total, (y if bias is None else y + bias.to(wide)).to(x.dtype)

    return run


def check_contract(tensors, parts, kind, backend):
    """Check both outputs and the gradients, for gradients of both outputs."""
    tensors = only(parts, tensors)
    seeds = [torch.randn_like(tensors[0]) for _ in range(2)]
    found = with_gradients(op(parts, kind, backend), [strided(t) for t in tensors], seeds)
    plain = with_gradients(naive(parts, kind), tensors, seeds)
    exact = with_gradients(naive(parts, kind), [t.double() for t in tensors], seeds)
    assert [t.dtype for t in found] == [tensors[0].dtype] * 2 + [t.dtype for t in tensors]
    for values in zip(found, plain, exact):
        assert_within_contract(*values)
