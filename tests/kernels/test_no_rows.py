"""Every op takes a batch of no rows, and gives results of the right shape and dtype."""

from __future__ import annotations

import pytest
import torch

from starflow_kernels import (
    Solver,
    affine_flow,
    affine_flow_inverse,
    attention_flow,
    bias_gelu,
    cached_attention,
    causal_attention,
    flow_head,
    linear,
    residual_norm,
    solve_inverse,
)

T, D, HEADS, HEAD_DIM, CHANNELS = 4, 3, 2, 8, 8


def results(rows: int, dtype: torch.dtype, backend: str | None) -> list[torch.Tensor]:
    """Return results of the ops and gradients of their inputs."""

    def random(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype)

    x, z = (random(rows, T, D, dtype=torch.promote_types(dtype, torch.float32)) for _ in range(2))
    q, h, params = random(rows, T, HEADS, HEAD_DIM), random(rows, T, CHANNELS), random(rows, T, 2 * D)
    inputs = [tensor.requires_grad_() for tensor in (x, q, h, params)]
    options = {"backend": backend}
    found = [
        *affine_flow(x, params, **options),
        causal_attention(q, q, q, **options),
        *flow_head(x, h, random(2 * D, CHANNELS), **options),
        *attention_flow(x, q, q, q, random(2 * D, HEADS * HEAD_DIM), **options),
        linear(h, random(5, CHANNELS), **options),
        bias_gelu(h, random(CHANNELS), **options),
        *residual_norm(h, h, random(CHANNELS), kind="rms_norm", **options),
    ]
    gradients = torch.autograd.grad([value.sum() for value in found], inputs)
    cache = [random(rows, T, HEADS, HEAD_DIM) for _ in range(2)]
    lengths = torch.zeros(rows, dtype=torch.int32)
    found.append(cached_attention(q.detach(), q.detach(), q.detach(), *cache, lengths, **options))
    found.append(affine_flow_inverse(z, params.detach(), **options))
    for solver in (Solver(), Solver("jacobi")):
        found.append(solve_inverse(lambda x: torch.zeros(len(x), T, 2 * D), z.float(), solver=solver).x)
    return [*found, *gradients]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_no_rows(backend, dtype):
    found, expected = (results(rows, dtype, backend) for rows in (0, 1))
    assert [(0, *value.shape[1:]) for value in expected] == [tuple(value.shape) for value in found]
    assert [value.dtype for value in expected] == [value.dtype for value in found]
