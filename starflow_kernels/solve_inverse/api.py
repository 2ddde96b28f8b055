"""Inverse of any causal conditioner, with a report of what was done."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch

from ..affine_flow.reference import affine_flow
from ..checks import check_finite, check_tensor
from ..spec import AffineSpec
from . import reference


@dataclasses.dataclass(frozen=True)
class SolveReport:
    """What a solver did: network passes, tokens evaluated (over all passes and rows), wall time in seconds, and on
    request the certificate, max |forward(x) - z| of one density pass over the result."""

    method: str
    passes: int
    tokens: int
    seconds: float
    certificate: float | None = None


@torch.no_grad()
def solve_inverse(
    conditioner: Callable[[torch.Tensor], torch.Tensor],
    z: torch.Tensor,
    spec: AffineSpec = AffineSpec(),
    *,
    order: torch.Tensor | None = None,
    method: str = "sequential",
    certify: bool = False,
) -> tuple[torch.Tensor, SolveReport]:
    """Solve x_t = mu_t(x) + sigma_t(x) z_t for x, where token t's parameters depend on earlier tokens alone.

    Args:
        conditioner: maps x (B, T, D) to raw parameters (B, T, 2D) [a | b] (D wide where spec.scale is "unit");
            those of token t may depend only on the tokens before it in `order`. A MADE over n scalars is
            T = n, D = 1.
        z: (B, T, D) finite noise.
        spec: how a and b become sigma and mu.
        order: permutation of 0 .. T - 1, the order in which tokens are generated; None: ascending.
        method: "sequential", one pass of the conditioner a token.
        certify: run one density pass over the result and report its residual.

    Returns:
        x (B, T, D) in the dtype of z, and a SolveReport.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or value; a conditioner whose output has the
            wrong shape; z or the result not finite.
    """
    check_tensor("z", z, ("B", "T", "D"))
    check_finite("z", z)
    if method != "sequential":
        raise ValueError(f"method={method!r}: expected 'sequential'")
    B, T, D = z.shape
    if order is not None and (not isinstance(order, torch.Tensor) or order.is_floating_point()):
        given = order.dtype if isinstance(order, torch.Tensor) else type(order).__name__
        raise TypeError(f"order: expected an integer tensor, got {given}")
    order = torch.arange(T) if order is None else order.cpu()
    if not torch.equal(order.sort().values, torch.arange(T)):
        raise ValueError(f"order: expected a permutation of 0 .. {T - 1}, got {order.tolist()}")

    def checked(x: torch.Tensor) -> torch.Tensor:
        params = conditioner(x)
        check_tensor("output of the conditioner", params, (B, T, spec.params_dim(D)), like=z)
        return params

    start = time.perf_counter()
    x, passes = reference.sequential(checked, z, order, spec.scale, spec.soft_clip)
    seconds = time.perf_counter() - start
    check_finite("x, the result", x)
    certificate = None
    if certify:
        again, _ = affine_flow(x, checked(x), spec.scale, spec.soft_clip, False, False, "sum")
        certificate = (again - z).abs().max().item()
    return x, SolveReport(method, passes, passes * B * T, seconds, certificate)
