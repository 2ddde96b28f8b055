"""Inverse of a flow with any causal conditioner by Jacobi sweeps over all tokens; converged samples leave the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .._core.numerics import DIVERGED
from ..affine_flow_inverse.reference import affine_flow_inverse, gaussian
from .quasi_newton import QuasiNewton
from .reference import check_solution


class Sweeps(NamedTuple):
    """Solution of a batch.

    x: data. passes: calls of the conditioner. sweeps: (B,) int32 passes per sample. residual: largest relative change
    in the last sweep. fallbacks: number of samples that diverged and went on token by token.
    """

    x: torch.Tensor
    passes: int
    sweeps: torch.Tensor
    residual: float
    fallbacks: int


def jacobi(
    conditioner: Callable,
    z: torch.Tensor,
    guess: torch.Tensor,
    order: torch.Tensor,
    scale: str,
    soft_clip: float,
    tol: float,
    neighbours: tuple[int, ...],
) -> Sweeps:
    """Iterate x <- mu(x) + sigma(x) z until no value changes by more than tol, each sample on its own.

    conditioner(x, rows) is called with the rows that are not done, or None for all rows. neighbours: see `Solver`.

    After k sweeps the first k tokens of `order` are exact and are kept, so T sweeps end every sample. A sample that
    diverges keeps its exact tokens, sets the others to zero, and goes on with one token per pass.
    """
    B, T, _ = z.shape
    order = order.to(z.device)
    rank = order.argsort()
    # NaN and infinity exceed every limit.
    limit = DIVERGED * z.abs().flatten(1).amax(1).clamp(min=1)
    x, params, passes = guess, None, 0
    model = QuasiNewton(neighbours, z) if neighbours else None
    # Number of exact tokens per sample.
    front, sweeps = torch.zeros(2, B, dtype=torch.int32, device=z.device)
    residual, live = torch.zeros_like(limit), torch.ones_like(limit, dtype=torch.bool)
    single = ~live
    while live.any():
        if live.all():
            params = conditioner(x, None)
        else:
            rows = live.nonzero().squeeze(1)
            params = params.index_copy(0, rows, conditioner(x[rows], rows))
        passes, sweeps = passes + 1, sweeps + live.int()
        # Transform all rows, as `sequential` does: the bits of torch's exp and tanh depend on the position in a tensor.
        new = affine_flow_inverse(z, params, None, scale, soft_clip, "tarflow")
        done, ahead = rank < front[:, None], rank > front[:, None]
        # Compare only tokens on which others depend: not the last token, nor tokens that were exact before.
        change = (new - x).abs() / new.abs().clamp(min=1)
        change = torch.where((done | (rank == T - 1))[..., None], 0, change).flatten(1).amax(1)
        if model is not None:
            rows = (live & ~single).nonzero().squeeze(1)
            sigma = gaussian(params[rows], None, scale, soft_clip, "tarflow")[1].to(z.dtype)
            spread, terms = sigma * z[rows], (x[rows], new[rows], sigma.log())
            terms = [term[:, order] for term in (*terms, spread)]
            stepped = model.step(rows, slice(0, T), *terms)
            new = new.index_copy(0, rows, stepped[:, rank])
        new = torch.where((done | (single[:, None] & ahead) | ~live[:, None])[..., None], x, new)
        sound = (new.abs().flatten(1).amax(1) <= limit) | ~live
        if not sound.all():
            if not (sound | ~single).all():
                check_solution(new, order)
            new = torch.where((sound[:, None] | done)[..., None], new, 0)
            single = single | ~sound
            limit = torch.where(single, torch.finfo(z.dtype).max, limit)
        x, front, residual = new, front + sound.int(), torch.where(live, change, residual)
        live = live & ~((change <= tol) & ~single) & (front < T)
    return Sweeps(x, passes, sweeps.cpu(), residual.max().item() if B else 0.0, int(single.sum()))
