"""Inverse of a flow with any causal conditioner, and a report of the solve."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from .._core.checks import check_finite, check_tensor
from .._core.registration import refuse_transforms
from .._core.torch_private import outside_graphs
from ..affine_flow.reference import affine_flow
from ..solver import Solver, SolveReport, check_solver
from ..spec import AffineSpec
from . import reference
from .jacobi import jacobi

INSTEAD = "differentiate affine_flow at the result, whose Jacobian is the inverse matrix; pass a batch as rows"


@outside_graphs("the values of each pass decide whether solve_inverse is done")
@torch.no_grad()
def solve_inverse(
    conditioner: Callable[..., torch.Tensor],
    z: torch.Tensor,
    spec: AffineSpec = AffineSpec(),
    *,
    order: torch.Tensor | None = None,
    solver: Solver = Solver(),
    context: tuple[torch.Tensor, ...] = (),
    guess: torch.Tensor | None = None,
    certify: bool = False,
) -> tuple[torch.Tensor, SolveReport]:
    """Solve x_t = mu_t(x) + sigma_t(x) z_t for x, where the parameters of token t depend only on earlier tokens.

    This inverts TarFlow (arXiv 2412.06329), eq. 3, for any network. Jacobi iteration follows arXiv 2505.12849 and
    2505.24791.

    Args:
        conditioner: maps x (B, T, D) to raw parameters (B, T, 2D) [a | b], or (B, T, D) if spec.scale is "unit". The
            parameters of token t may depend only on tokens before it in `order`, and a row only on the same row of x.
            A MADE over n scalars has T = n and D = 1.
        z: (B, T, D) finite noise, any floating dtype.
        spec: map from a and b to sigma and mu, as in `affine_flow`.
        order: permutation of 0 .. T - 1, the order in which tokens are generated; None: ascending.
        solver: sequential or Jacobi, see `Solver`. Every pass evaluates all tokens, so its window must be 0.
        context: tensors of B rows, passed as conditioner(x, *context) without the rows of finished samples.
        guess: (B, T, D) finite initial values of Jacobi, in place of solver.guess.
        certify: run one density pass over the result and report its largest error.

    Returns:
        x (B, T, D) in the dtype of z, and a SolveReport. Not differentiable.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: an argument of the wrong shape or value; an output of the conditioner of the wrong shape; z not
            finite; a result that is not finite, with its token and sample.

    Equivalent to:
        ```python
        x = torch.zeros_like(z)
        for t in range(z.shape[1]):
            x[:, t] = affine_flow_inverse(z, conditioner(x), spec)[:, t]
        ```
    """
    refuse_transforms("solve_inverse", INSTEAD, z, guess, context)
    check_tensor("z", z, ("B", "T", "D"))
    check_finite(z=z)
    B, T, D = z.shape
    _check_solver(solver)
    if guess is not None:
        check_tensor("guess", guess, (B, T, D), like=z)
        check_finite(guess=guess)
    _check_context(context, B)
    order = _checked_order(order, T)

    def checked(x: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        params = conditioner(x, *(c if rows is None else c[rows] for c in context))
        refuse_transforms("solve_inverse", INSTEAD, params)
        check_tensor("output of the conditioner", params, (len(x), T, spec.params_dim(D)), like=z)
        return params

    start = time.perf_counter()
    if solver.method == "jacobi":
        if guess is None:
            guess = z if solver.guess == "noise" else torch.zeros_like(z)
        solved = jacobi(checked, z, guess.to(z.dtype), order, spec.scale, spec.soft_clip, solver.tol, solver.neighbours)
        x, passes, sweeps = solved.x, solved.passes, solved.sweeps
        residual, fallbacks = solved.residual, solved.fallbacks
    else:
        x = reference.sequential(checked, z, order, spec.scale, spec.soft_clip)
        passes, sweeps = T, torch.ones(B, dtype=torch.int32, device="cpu")
        residual, fallbacks = 0.0, 0
    seconds = time.perf_counter() - start
    tokens = T * (B * T if solver.method == "sequential" else int(sweeps.sum()))
    certificate = None
    if certify:
        noise, _ = affine_flow(x, checked(x), spec.scale, spec.soft_clip, False, False, "sum")
        certificate = (noise - z).abs().max().item() if B else 0.0
    sweeps = sweeps[:, None].repeat(1, T)
    return x, SolveReport(solver.method, passes, tokens, seconds, sweeps, residual, fallbacks, certificate)


def _check_solver(solver: Solver) -> None:
    check_solver(solver)
    if solver.window:
        raise ValueError(f"solver: window={solver.window}, expected 0, since every pass evaluates all tokens")


def _check_context(context: tuple[torch.Tensor, ...], B: int) -> None:
    if not isinstance(context, (tuple, list)):
        raise TypeError(f"context: expected a tuple of tensors, got {type(context).__name__}")
    for i, tensor in enumerate(context):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"context[{i}]: expected a tensor, got {type(tensor).__name__}")
        if tensor.shape[:1] != (B,):
            raise ValueError(f"context[{i}]: shape {tuple(tensor.shape)}, expected {B} rows")


def _checked_order(order: torch.Tensor | None, T: int) -> torch.Tensor:
    if order is None:
        return torch.arange(T, dtype=torch.int64, device="cpu")
    if not isinstance(order, torch.Tensor) or order.is_floating_point():
        given = order.dtype if isinstance(order, torch.Tensor) else type(order).__name__
        raise TypeError(f"order: expected an integer tensor, got {given}")
    order = order.cpu().long()
    if not torch.equal(order.sort().values, torch.arange(T, dtype=torch.int64, device="cpu")):
        raise ValueError(f"order: expected a permutation of 0 .. {T - 1}, got {order.tolist()}")
    return order
