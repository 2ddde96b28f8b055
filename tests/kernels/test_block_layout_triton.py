"""Orders, lengths, conditions per token and given tokens in Triton's interpreter, see test_block_layout.py."""

from __future__ import annotations

import pytest
import torch
from support.arranged import drawn_call, expected_inverse
from support.backends import require_interpreter
from support.blocks import BLOCKS, GPU_BLOCKS, T, block

from starflow_kernels import Solver, block_inverse

require_interpreter()

SOLVERS = [Solver(), Solver("jacobi", window=3, tol=1e-6), Solver("jacobi", window=3, tol=1e-6, neighbours=(1, 2))]


@pytest.mark.parametrize("part", range(6))
def test_drawn_calls(part):
    for seed in range(part, 24, 6):
        z, w, spec, context, layout, inverse = drawn_call(seed, torch.float32, GPU_BLOCKS)
        wide_w, wide = ({name: value.double() for name, value in values.items()} for values in (w, context))
        data = None if inverse["data"] is None else inverse["data"].double()
        expected = expected_inverse(z.double(), wide_w, spec, wide, **layout, **{**inverse, "data": data}).float()
        for solver in SOLVERS:
            x = block_inverse(z, w, spec, **context, **layout, **inverse, solver=solver, backend="triton").x
            torch.testing.assert_close(x, expected, rtol=2e-3, atol=2e-3)


def test_given_tokens_take_no_steps(monkeypatch):
    """One row has fewer given tokens than the others, and passes of 2 slots fill the cache."""
    from starflow_kernels.block.triton import sequential, sizes

    steps, known, B = [], torch.tensor([3, 5, 2]), 3
    z, w, spec, context = block(BLOCKS["starflow-text-flip-cond"], B=B, dtype=torch.float32)
    expected = block_inverse(z, w, spec, **context, data=z, known=known, backend="reference").x
    monkeypatch.setattr(sizes, "PASS_ROWS", 6)
    monkeypatch.setattr(sequential, "kept_sessions", sequential.Sessions())

    def launch(self, w, original=sequential.TritonSession.launch):
        steps.append(0)
        original(self, w)

    monkeypatch.setattr(sequential.TritonSession, "launch", launch)
    x = block_inverse(z, w, spec, **context, data=z, known=known, backend="triton").x
    torch.testing.assert_close(x, expected, rtol=2e-3, atol=2e-3)
    assert len(steps) == T - 2
