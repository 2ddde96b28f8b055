"""Sampling with products of bfloat16 values: weights and inputs are rounded, sums are not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from support.backends import needs_native
from support.blocks import BLOCKS, STARFLOW, block, every_block
from support.contract import assert_within_contract, compiled

from starflow_kernels import Solver, block_inverse, stack_inverse
from starflow_kernels._core.compiled import native_unavailable
from starflow_kernels.block import native, reference
from starflow_kernels.block.quantize import fake_quantize, is_matrix

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
LACKS = native_unavailable() or native.refuse(torch.zeros(1), [torch.zeros(1)], "bfloat16")
needs_products = pytest.mark.skipif(LACKS is not None, reason=str(LACKS))
weight_dtypes = pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
# Rounding errors of an input in float32 that no sample here exceeds, relative to the largest value of the row.
DELTA = 4 * torch.finfo(F32).eps


def margins(x: torch.Tensor) -> torch.Tensor:
    """Return the smallest distance in each sample x (B, n, K) from a value to where its rounding changes.

    It is relative to the largest value of the row. Rounding moves smaller values than 2^-15 of that by less than eps.
    """
    largest = x.abs().amax(-1, keepdim=True)
    step = torch.exp2(x.abs().clamp(min=1e-300).log2().floor() - 7)
    distance = (x.abs() / step % 1 - 0.5).abs() * step / largest
    return distance.where(x.abs() > 2**-15 * largest, torch.inf).flatten(1).amin(1)


@needs_products
@weight_dtypes
@every_block
def test_samples_are_those_of_the_reference(case, dtype, monkeypatch):
    compared = 0
    for _ in range(60):
        compared += compared_samples(case, dtype, monkeypatch)
        if compared >= 10:
            return
    raise AssertionError(f"only {compared} samples could be compared")


def compared_samples(case, dtype, monkeypatch, B: int = 32) -> int:
    """Compare samples of a block in which all inputs round alike in float32 and float64; return their number.

    These have the errors of float32 alone. All samples share the first slot of a block with a start token.
    """
    z, w, spec, context = block(case, B=B, dtype=dtype)
    smallest = torch.full((B,), torch.inf, dtype=F64)

    def linear(x, weight, bias=None):
        smallest.copy_(smallest.minimum(margins(x)))
        return F.linear(x.to(BF16).to(F64), weight, bias)

    wide, single = ({n: t.to(to) for n, t in w.items()} for to in (F64, F32))
    options, context = ({n: t.to(to) for n, t in context.items()} for to in (F64, F32))
    with monkeypatch.context() as patch:
        patch.setattr(reference, "linear_of", lambda kind: linear)
        exact = block_inverse(z.double(), wide, spec, **options, quantize="bfloat16").x
    alike = (smallest > DELTA) & (exact.abs().amax((1, 2)) < 100)
    if not alike.any():
        return 0
    plain = block_inverse(z, single, spec, **context, quantize="bfloat16", backend="reference").x
    for solver in (Solver(), Solver("jacobi", 3, tol=0)):
        found = block_inverse(z, w, spec, **context, quantize="bfloat16", backend="native", solver=solver).x
        assert_within_contract(found[alike], plain[alike], exact[alike])
    unrounded = block_inverse(z, w, spec, **context, backend="native").x
    assert (unrounded - exact)[alike].abs().max() > 100 * (found - exact)[alike].abs().max()
    return int(alike.sum())


@needs_products
def test_a_row_has_the_same_bits_in_any_batch_and_on_any_number_of_threads():
    # More than 256 pairs of inputs, odd numbers of inputs, groups of one and of four column tiles, and enough weights
    # for two threads per row.
    overrides = {**STARFLOW, "layers": 4, "text_dim": 601, "channels": 80, "mlp_dim": 1043}
    z, w, spec, context = block((overrides, False, 3), B=40, dtype=F32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = block_inverse(z, w, spec, **context, quantize="bfloat16", backend="native").x
        torch.set_num_threads(2)
        for rows in (slice(0, 1), slice(3, 5), slice(7, 11), slice(2, 9), slice(0, 40)):
            own = {**context, "prefix": context["prefix"][rows]}
            for solver in (Solver(), Solver("jacobi", 3, tol=0)):
                found = block_inverse(z[rows], w, spec, **own, quantize="bfloat16", backend="native", solver=solver).x
                assert torch.equal(found, alone[rows])
    finally:
        torch.set_num_threads(threads)


@needs_products
def test_guided_blocks_in_one_call_have_the_bits_of_single_calls():
    z, w, spec, context = block(BLOCKS["starflow-text"], B=3, dtype=F32, copies=2)
    options = {**context, "guidance": 1.5, "quantize": "bfloat16"}
    first, second = stack_inverse(z, [(w, spec, options)] * 2, backend="native")
    assert torch.equal(second.x, block_inverse(z, w, spec, **options, backend="native").x)
    assert torch.equal(first.x, block_inverse(second.x, w, spec, **options, backend="native").x)


@weight_dtypes
def test_the_matrices_of_products_are_rounded(dtype):
    _, w, spec, _ = block(BLOCKS["tarflow-text"], dtype=dtype)
    found = dict(zip(w, fake_quantize(spec, list(w.values()), "bfloat16")))
    assert {name for name in w if is_matrix(name, w[name].shape)} >= {"proj_in.weight", "proj_text.weight"}
    for name, weight in w.items():
        rounded = is_matrix(name, weight.shape)
        assert found[name].dtype == dtype
        assert torch.equal(found[name], weight.to(BF16).to(dtype) if rounded else weight)
    assert not is_matrix("pos_embed", w["pos_embed"].shape)


def test_a_graph_takes_the_option():
    z, w, spec, context = block(BLOCKS["tarflow-flip"])

    def sampled(z):
        return block_inverse(z, w, spec, **context, quantize="bfloat16").x

    assert torch.equal(compiled(sampled)(z), sampled(z))


def test_there_is_no_gradient():
    z, w, spec, context = block(BLOCKS["tarflow"], dtype=F32)
    with pytest.raises(ValueError, match="no gradient with quantize='bfloat16'"):
        block_inverse(z.requires_grad_(), w, spec, **context, quantize="bfloat16")


@needs_native
def test_a_processor_without_such_products_is_refused():
    program = """
import torch
from starflow_kernels import BlockSpec, block_inverse
spec = BlockSpec(token_dim=3, channels=8, layers=1, heads=2, head_dim=4, kv_heads=2, mlp_dim=12)
w, z = {name: torch.full(shape, 0.01) for name, shape in spec.weight_shapes.items()}, torch.ones(1, 2, 3)
assert block_inverse(z, w, spec, quantize="bfloat16").x.isfinite().all()
assert block_inverse(z, w, spec, backend="native").x.isfinite().all()
block_inverse(z, w, spec, quantize="bfloat16", backend="native")
"""
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, env={**os.environ, "STARFLOW_ISA": "base"}, capture_output=True, text=True)
    assert found.returncode == 1
    assert "cannot run block_inverse: quantize='bfloat16' takes products of bfloat16" in found.stderr
    assert "avx512_bf16" in found.stderr
