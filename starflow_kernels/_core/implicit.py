"""Gradient of an inverse x(z, inputs), f(x, inputs) = z, by the implicit function theorem.

With J = df/dx at the result, dx = J^-1 (dz - df/dinputs dinputs). So the backward pass solves J^T u = dL/dx once. Then
dL/dz = u, and the gradients of the inputs are those of -u . f(x, inputs). Nothing of the inverse itself is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .numerics import DIVERGED
from .torch_private import apply_outside_transforms, is_batched, version

# The solution of J^T u = g is accepted where the largest residual is at most eps max(|g|, |J^T u|). It is also accepted
# up to this multiple of that, and at most this share, once so many sweeps have not halved it: rounding errors are left.
LOOSER, SHARE, STALLED = 512, 0.02, 4


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    """Return whether a gradient with respect to one of the tensors is needed."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class Equation(NamedTuple):
    """Equation f(x, inputs) = z of an inverse.

    density: density(x, *inputs) returns f(x, inputs) and -log sigma, (B, T, D) each, with gradients. solve: solve(g, x,
    *inputs) returns u with J^T u = g, see `solve_transposed`. given: (B, T) whether a token of x is data, so that z
    does not determine it; or None.
    """

    density: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    solve: Callable[..., torch.Tensor]
    given: torch.Tensor | None


def with_gradient(
    x: torch.Tensor,
    equation: Equation,
    z: torch.Tensor,
    data: torch.Tensor | None,
    inputs: Sequence[torch.Tensor | None],
) -> torch.Tensor:
    """Return x, with its gradient with respect to z, data and inputs.

    Args:
        x: (B, T, D) solution, computed without a gradient.
        equation: the equation that it solves.
        z: (B, T, D) noise.
        data: (B, T, D) data of the given tokens, or None.
        inputs: further arguments of `equation.density`.
    """
    return apply_outside_transforms(_Solution, x, equation, z, data, *inputs)


class _Solution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, equation, z, data, *inputs):
        ctx.equation = equation
        ctx.save_for_backward(x, *inputs)
        return x.detach()

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "the gradient of an inverse has no derivative: call backward without create_graph, or differentiate "
                "the density at the result"
            )
        if is_batched(grad):
            raise NotImplementedError(
                "the gradient of an inverse takes no batch of gradients (is_grads_batched, vectorize): loop over them"
            )
        (x, *inputs), equation, needed = ctx.saved_tensors, ctx.equation, ctx.needs_input_grad
        u = equation.solve(grad, x.detach(), *[None if t is None else t.detach() for t in inputs])
        given = None if equation.given is None else equation.given[..., None]
        grad_z = u if given is None else u.masked_fill(given, 0)
        grad_data = u - grad_z if needed[3] else None
        return (
            None,
            None,
            grad_z if needed[2] else None,
            grad_data,
            *_of_inputs(equation, x, inputs, needed[4:], grad_z),
        )


def _of_inputs(equation: Equation, x: torch.Tensor, inputs, needed, u: torch.Tensor) -> list[torch.Tensor | None]:
    """Return the gradients of -u . f(x, inputs) with respect to the inputs that need one."""
    if not any(needed):
        return [None] * len(inputs)
    with torch.enable_grad():
        leaves = [t if t is None else t.detach().requires_grad_(need) for t, need in zip(inputs, needed)]
        z, _ = equation.density(x.detach(), *leaves)
    wanted = [leaf for leaf, need in zip(leaves, needed) if need]
    found = iter(torch.autograd.grad(z, wanted, -u.to(z.dtype), allow_unused=True))
    return [next(found) if need else None for need in needed]


def solve_transposed(
    density: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    g: torch.Tensor,
    x: torch.Tensor,
    rank: torch.Tensor,
    given: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Solve J^T u = g for u (B, T, D), by sweeps u <- u + sigma (g - J^T u) over all tokens.

    J = df/dx is triangular with 1 / sigma on its diagonal, so after k sweeps the last k tokens are exact. A sample that
    diverges keeps its exact tokens, sets the others to zero, and goes on with one token per sweep.

    Args:
        density: density(x) returns f(x) and -log sigma, with gradients.
        g: (B, T, D) right-hand side.
        x: (B, T, D) point at which J is taken.
        rank: (T,) or (B, T), the place of each token in the order in which they depend on each other.
        given: (B, T) whether a token is its own equation, x = data; or None.
        dtype: the least precise one that `density` computes in.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        z, minus_log_sigma = density(x)
    given = None if given is None else given[..., None]
    sigma = minus_log_sigma.detach().neg().exp().to(g.dtype)
    sigma = sigma if given is None else sigma.masked_fill(given, 1)

    def pull(u: torch.Tensor) -> torch.Tensor:
        # A given token is its own equation, x = data.
        own = u if given is None else u.masked_fill(given, 0)
        (pulled,) = torch.autograd.grad(z, x, own.to(z.dtype), retain_graph=True)
        return pulled.to(g.dtype) + (u - own)

    return sweep_transposed(pull, g, sigma, rank.to(x.device), dtype)


def sweep_transposed(
    pull: Callable[[torch.Tensor], torch.Tensor],
    g: torch.Tensor,
    sigma: torch.Tensor,
    rank: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Solve J^T u = g for u (B, T, D) by the sweeps of `solve_transposed`.

    Args:
        pull: pull(u) returns J^T u.
        g: (B, T, D) right-hand side.
        sigma: (B, T, D) or (1, 1, 1), inverse of the diagonal of J.
        rank: (T,) or (B, T), the place of each token in the order in which they depend on each other.
        dtype: the least precise one that `pull` computes in.
    """
    B, T, _ = g.shape
    # Place of a token from the end, where the solution begins.
    rank = T - 1 - rank.expand(B, T)[..., None]
    tolerance = torch.finfo(dtype).eps
    limit = DIVERGED * _largest(sigma) * _largest(g).clamp(min=1)
    u, exact = torch.zeros_like(g), torch.zeros_like(limit, dtype=torch.int64)
    single, sizes = torch.zeros_like(limit, dtype=torch.bool), []
    while True:
        pulled = pull(u)
        residual = g - pulled
        terms = torch.maximum(_largest(g), _largest(pulled)).clamp(min=torch.finfo(g.dtype).tiny)
        sizes.append(_largest(residual) / terms)
        converged = sizes[-1] <= tolerance
        if len(sizes) > STALLED:
            converged |= (sizes[-1] <= min(LOOSER * tolerance, SHARE)) & (2 * sizes[-1] >= sizes[-1 - STALLED])
        if (converged | (exact >= T)).all():
            return u
        step = sigma * residual
        new = u + step.masked_fill((rank < exact) | (single & (rank > exact)), 0)
        sound = single | (_largest(new) <= limit)
        u = torch.where(sound | (rank < exact), new, 0)
        exact, single = exact + sound, ~sound | single


def _largest(values: torch.Tensor) -> torch.Tensor:
    """Return the largest absolute value of each sample, (B, 1, 1)."""
    return values.abs().amax((1, 2), keepdim=True)


class Unchanged:
    """Check that tensors, which a result reads later, still have their values.

    Args:
        tensors: the tensors, or None.
    """

    def __init__(self, tensors: Sequence[torch.Tensor | None]) -> None:
        self._versions = [(t, version(t)) for t in tensors if t is not None]

    def check(self) -> None:
        """Raise RuntimeError if a tensor has been modified in place."""
        if any(version(t) != before for t, before in self._versions):
            raise RuntimeError("logdet: weights, conditions or x were modified in place before it was read")
