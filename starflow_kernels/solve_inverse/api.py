"""Inverse of a flow with any causal conditioner, and a report of the solve."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import cast

import torch

from .._core.checks import check_finite, check_tensor
from .._core.implicit import Equation, Unchanged, needs_gradient, solve_transposed, with_gradient
from .._core.registration import call, refuse_transforms
from .._core.token_order import check_counts, own_order, with_given
from .._core.torch_private import outside_graphs, version
from ..affine_flow.reference import affine_flow
from ..solver import Inverse, Solver, SolveReport, check_solver, sum_log_sigma
from ..spec import AffineSpec
from . import reference
from .jacobi import jacobi

INSTEAD = "differentiate affine_flow at the result, whose Jacobian is the inverse matrix; pass a batch as rows"


@outside_graphs("the values of each pass decide whether solve_inverse is done")
def solve_inverse(
    conditioner: Callable[..., torch.Tensor],
    z: torch.Tensor,
    spec: AffineSpec = AffineSpec(),
    *,
    order: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    solver: Solver = Solver(),
    context: tuple[torch.Tensor, ...] = (),
    guess: torch.Tensor | None = None,
    data: torch.Tensor | None = None,
    known: torch.Tensor | None = None,
    certify: bool = False,
) -> Inverse:
    """Solve x_t = mu_t(x) + sigma_t(x) z_t for x, where the parameters of token t depend only on earlier tokens.

    This inverts TarFlow (arXiv 2412.06329), eq. 3, for any network. Jacobi iteration follows arXiv 2505.12849 and
    2505.24791.

    Args:
        conditioner: maps x (B, T, D) to raw parameters (B, T, 2D) [a | b], or (B, T, D) if spec.scale is "unit". The
            parameters of token t may depend only on tokens before it in `order`, and a row only on the same row of x.
            A MADE over n scalars has T = n and D = 1.
        z: (B, T, D) finite noise, any floating dtype.
        spec: map from a and b to sigma and mu, as in `affine_flow`.
        order: integers (T,) or (B, T), permutations of 0 .. T - 1, the order in which tokens are generated; None:
            ascending.
        lengths: integers (B,). Only the first tokens of a sample, that many, belong to it. The others come last in its
            order and pass unchanged; the conditioner sees zeros in their place.
        solver: sequential or Jacobi, see `Solver`. Every pass evaluates all tokens, so its window must be 0.
        context: tensors of B rows, passed as conditioner(x, *context) without the rows of finished samples.
        guess: (B, T, D) finite initial values of Jacobi, in place of solver.guess.
        data: (B, T, D) tokens, of which the first ones, `known` in number, are finite and part of the result.
        known: integers (B,), how many tokens of `data` are given, counted in `order`. Noise is not needed for them, nor
            a pass.
        certify: run one density pass over the result and report its largest error.

    Returns:
        An `Inverse`: x (B, T, D) in the dtype of z; logdet (B,), log|det dx/dz| of the solved tokens; and the report of
        the solve. x and logdet have gradients with respect to z, data, context and, if the conditioner is an nn.Module,
        its parameters, by the implicit function theorem: the backward pass runs the conditioner at x and solves a
        triangular system by sweeps of vector-Jacobian products.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: an argument of the wrong shape or value; an output of the conditioner of the wrong shape; z not
            finite; a result that is not finite, with its token and sample; a conditioner that changes its input, or
            that is a function of tensors with gradients while z, data or context needs one.

    Equivalent to:
        ```python
        x = torch.zeros_like(z)
        for t in range(z.shape[1]):
            x[:, t] = affine_flow_inverse(z, conditioner(x), spec)[:, t]
        ```
    """
    refuse_transforms("solve_inverse", INSTEAD, z, guess, context, order, lengths, data, known)
    check_tensor("z", z, ("B", "T", "D"))
    B, T, D = z.shape
    unchanged, tokens = z, _tokens(z, order, lengths, known)
    z = z.detach().masked_fill((tokens.rank >= tokens.last[:, None])[..., None], 0)
    if data is not None:
        check_tensor("data", data, (B, T, D), like=z)
    z = with_given(z, data, None if known is None else tokens.rank < tokens.first[:, None])
    check_finite(z=z)
    _check_solver(solver)
    if guess is not None:
        if solver.method == "sequential":
            raise ValueError("guess: given, but the sequential solver takes none")
        check_tensor("guess", guess, (B, T, D), like=z)
        check_finite(guess=guess)
    _check_context(context, B)

    def checked(x: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        before = version(x)
        params = conditioner(x, *(c if rows is None else c[rows] for c in context))
        if version(x) != before:
            raise ValueError("conditioner: it modified its input in place")
        refuse_transforms("solve_inverse", INSTEAD, params)
        check_tensor("output of the conditioner", params, (len(x), T, spec.params_dim(D)), like=z)
        return params

    with torch.no_grad():
        x, log_sigma, report = _solve(checked, z, tokens, spec, solver, guess, certify)
        x = torch.where((tokens.rank < tokens.last[:, None])[..., None], x, unchanged)
    module = conditioner if isinstance(conditioner, torch.nn.Module) else None
    learned = {} if module is None else {**dict(module.named_parameters()), **dict(module.named_buffers())}
    inputs = (*context, *learned.values())
    if not needs_gradient(unchanged, data, *inputs):
        return Inverse(x, functools.partial(sum_log_sigma, log_sigma), lambda: report)
    if module is None and checked(x.detach(), None).requires_grad and not any(c.requires_grad for c in context):
        raise ValueError(
            "conditioner: it uses tensors with gradients; make it an nn.Module with these parameters, pass them as "
            "`context`, or call solve_inverse under torch.no_grad()"
        )
    equation = _equation(conditioner, learned, len(context), tokens, spec, z.dtype)
    x = with_gradient(x, equation, unchanged, data, inputs)
    state = Unchanged((x, *inputs))

    def logdet() -> torch.Tensor:
        state.check()
        with torch.inference_mode(False), torch.enable_grad():
            return sum_log_sigma(-equation.density(x, *inputs)[1].masked_fill(~tokens.solved[..., None], 0))

    return Inverse(x, logdet, lambda: report)


def _equation(
    conditioner: Callable, learned: dict, contexts: int, tokens: reference.Tokens, spec: AffineSpec, dtype: torch.dtype
) -> Equation:
    """Return the equation that the result solves; its inputs are `contexts` tensors and the parameters `learned`."""
    inside = (tokens.rank < tokens.last[:, None])[..., None]

    def density(x: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        own = x.masked_fill(~inside, 0)
        if learned:
            named = dict(zip(learned, inputs[contexts:]))
            params = torch.func.functional_call(cast("torch.nn.Module", conditioner), named, (own, *inputs[:contexts]))
        else:
            params = conditioner(own, *inputs)
        z, minus_log_sigma = call(
            "affine_flow", own, params, spec.scale, spec.soft_clip, False, False, "none", backend=None
        )
        return torch.where(inside, z, x), minus_log_sigma.masked_fill(~inside, 0)

    given = tokens.rank < tokens.first[:, None]

    def solve(g: torch.Tensor, x: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return solve_transposed(lambda x: density(x, *inputs), g, x, tokens.rank, given, dtype)

    return Equation(density, solve, given)


def _solve(
    checked: Callable,
    z: torch.Tensor,
    tokens: reference.Tokens,
    spec: AffineSpec,
    solver: Solver,
    guess: torch.Tensor | None,
    certify: bool,
) -> tuple[torch.Tensor, torch.Tensor, SolveReport]:
    start, (B, T, _) = time.perf_counter(), z.shape
    if solver.method == "jacobi":
        if guess is None:
            guess = z if solver.guess == "noise" else torch.zeros_like(z)
        guess = torch.where(tokens.solved[..., None], guess.to(z.dtype), z)
        solved = jacobi(checked, z, guess, tokens, spec.scale, spec.soft_clip, solver.tol, solver.neighbours)
        x, log_sigma, passes, sweeps = solved.x, solved.log_sigma, solved.passes, solved.sweeps
        residual, fallbacks = solved.residual, solved.fallbacks
    else:
        start_values = z.masked_fill(tokens.solved[..., None], 0)
        x, log_sigma, passes = reference.sequential(checked, z, start_values, tokens, spec.scale, spec.soft_clip)
        sweeps = torch.ones(B, dtype=torch.int32, device="cpu")
        residual, fallbacks = 0.0, 0
    seconds = time.perf_counter() - start
    evaluations = T * (B * passes if solver.method == "sequential" else int(sweeps.sum()))
    certificate = None
    if certify:
        noise, _ = affine_flow(x, checked(x), spec.scale, spec.soft_clip, False, False, "sum")
        certificate = (noise - z)[tokens.solved].abs().max().item() if tokens.solved.any() else 0.0
    sweeps = sweeps[:, None].repeat(1, T)
    report = SolveReport(solver.method, passes, evaluations, seconds, sweeps, residual, fallbacks, certificate)
    return x, log_sigma, report


def _tokens(
    z: torch.Tensor, order: torch.Tensor | None, lengths: torch.Tensor | None, known: torch.Tensor | None
) -> reference.Tokens:
    B, T, _ = z.shape
    index, counts = own_order(order, lengths, B, T, z.device)
    if index is None:
        index = torch.arange(T, dtype=torch.int64, device=z.device).expand(B, T)
    last = torch.full((B,), T, dtype=torch.int64, device=z.device) if counts is None else counts[:, 0]
    first = torch.zeros_like(last) if known is None else check_counts("known", known, B, T).to(z.device)
    return reference.Tokens(index, index.argsort(1), torch.minimum(first, last), last)


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
