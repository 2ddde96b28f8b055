"""The error contract, equal bits of a row in any batch, and helpers to call an op with its gradient."""

from __future__ import annotations

import math

import torch


def assert_within_contract(actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """Check that values are finite and max|actual - exact| <= 2 (max|plain - exact| + eps max|exact|).

    plain: torch in the dtype of `actual`.
    """
    assert torch.isfinite(actual).all()
    error, allowed = ((t.double() - exact).abs().max().item() for t in (actual, plain))
    eps = torch.finfo(actual.dtype).eps
    bound = 2 * (allowed + eps * exact.abs().max().item())
    assert error <= bound, f"error {error:.3g} above {bound:.3g}; that of torch is {allowed:.3g}"


def assert_same_row(backend: str, alone: torch.Tensor, batched: torch.Tensor) -> None:
    """Check that a row computed alone equals the row of a batch: to the bit, except on the reference backend.

    There torch chooses vector tails, reduction splits and GEMM kernels by shape, which moves the last bits.
    """
    if backend == "reference":
        bound = 32 * torch.finfo(alone.dtype).eps * batched.abs().max().clamp(min=1)
        assert (alone - batched).abs().max() <= bound
    else:
        assert torch.equal(alone, batched)


def strided(x: torch.Tensor) -> torch.Tensor:
    """Return the values of x in memory of which every second element is NaN."""
    return torch.stack([x.detach(), torch.full_like(x, math.nan)], dim=-1)[..., 0]


def compiled(function, backend="aot_eager", dynamic: bool | None = None):
    """Compile the function as one graph, from an empty compile cache."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)


def with_gradients(function, tensors, seeds) -> list[torch.Tensor]:
    """Return the outputs of function(*tensors), then the gradients of their inner product with `seeds`."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    outputs = function(*tensors)
    inner = sum((output * seed.to(output.dtype)).sum() for output, seed in zip(outputs, seeds))
    return [*(output.detach() for output in outputs), *torch.autograd.grad(inner, tensors, materialize_grads=True)]
