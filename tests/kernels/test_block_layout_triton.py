"""Orders, lengths, conditions per token and given tokens in Triton's interpreter, see test_block_layout.py."""

from __future__ import annotations

import pytest
import torch
from support.arranged import drawn_call, expected_inverse
from support.backends import require_interpreter
from support.blocks import GPU_BLOCKS

from starflow_kernels import Solver, block_inverse

require_interpreter()


@pytest.mark.parametrize("part", range(6))
def test_drawn_calls(part):
    for seed in range(part, 24, 6):
        z, w, spec, context, layout, inverse = drawn_call(seed, torch.float32, GPU_BLOCKS)
        wide_w, wide = ({name: value.double() for name, value in values.items()} for values in (w, context))
        data = None if inverse["data"] is None else inverse["data"].double()
        expected = expected_inverse(z.double(), wide_w, spec, wide, **layout, **{**inverse, "data": data}).float()
        for solver in (Solver(), Solver("jacobi", window=3, tol=1e-6)):
            x = block_inverse(z, w, spec, **context, **layout, **inverse, solver=solver, backend="triton").x
            torch.testing.assert_close(x, expected, rtol=2e-3, atol=2e-3)


def test_given_tokens_with_neighbours_are_refused():
    calls = (drawn_call(seed, blocks=GPU_BLOCKS) for seed in range(99))
    z, w, spec, context, layout, inverse = next(c for c in calls if c[-1]["known"] is not None)
    z, w, context = z.float(), *({n: v.float() for n, v in values.items()} for values in (w, context))
    inverse["data"] = inverse["data"].float()
    with pytest.raises(ValueError, match="it takes given tokens with plain Jacobi alone, not with neighbours"):
        solver = Solver("jacobi", neighbours=(1,))
        block_inverse(z, w, spec, **context, **layout, **inverse, solver=solver, backend="triton")
