"""Inverse of a flow with any causal conditioner by Jacobi sweeps over all tokens; converged samples leave the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .._core.numerics import DIVERGED, accumulation_dtype
from .._core.token_order import take
from ..affine_flow_inverse.reference import affine_flow_inverse, gaussian
from .quasi_newton import QuasiNewton
from .reference import Tokens, check_solution, log_scales


class Sweeps(NamedTuple):
    """Solution of a batch.

    x: data. log_sigma: that of the solved tokens, zero for the others. passes: calls of the conditioner. sweeps: (B,)
    int32 passes per sample. residual: largest relative change in the last sweep. fallbacks: number of samples that
    diverged and went on token by token.
    """

    x: torch.Tensor
    log_sigma: torch.Tensor
    passes: int
    sweeps: torch.Tensor
    residual: float
    fallbacks: int


def jacobi(
    conditioner: Callable,
    z: torch.Tensor,
    guess: torch.Tensor,
    tokens: Tokens,
    scale: str,
    soft_clip: float,
    tol: float,
    neighbours: tuple[int, ...],
) -> Sweeps:
    """Iterate x <- mu(x) + sigma(x) z until no value changes by more than tol, each sample on its own.

    conditioner(x, rows) is called with the rows that are not done, or None for all rows. guess holds the given tokens.
    neighbours: see `Solver`.

    Each sweep makes at least one more token exact, which is kept, so that T sweeps end every sample. A sample that
    diverges keeps its exact tokens, sets the others to zero, and goes on with one token per pass.
    """
    B, T, _ = z.shape
    order, rank, first, last = tokens
    unsolved = ~tokens.solved
    # NaN and infinity exceed every limit.
    limit = DIVERGED * z.abs().flatten(1).amax(1).clamp(min=1)
    x, params, passes = guess, None, 0
    model = QuasiNewton(neighbours, z) if neighbours else None
    # Number of exact tokens per sample.
    front, sweeps = first, torch.zeros(B, dtype=torch.int32, device=z.device)
    residual, live = torch.zeros_like(limit), front < last
    single = torch.zeros_like(live)
    while live.any():
        if live.all():
            params = conditioner(x, None)
        else:
            rows = live.nonzero().squeeze(1)
            found = conditioner(x[rows], rows)
            params = found.new_zeros(B, *found.shape[1:]) if params is None else params
            params = params.index_copy(0, rows, found)
        passes, sweeps = passes + 1, sweeps + live.int()
        # Transform all rows, as `sequential` does: the bits of torch's exp and tanh depend on the position in a tensor.
        new = affine_flow_inverse(z, params, None, scale, soft_clip, "tarflow")
        new = torch.where(unsolved[..., None], x, new)
        done, ahead = unsolved | (rank < front[:, None]), rank > front[:, None]
        # Compare only tokens on which others depend: not the last token, nor tokens that were exact before.
        change = (new - x).abs() / new.abs().clamp(min=1)
        change = torch.where((done | (rank == last[:, None] - 1))[..., None], 0, change).flatten(1).amax(1)
        if model is not None:
            rows = (live & ~single).nonzero().squeeze(1)
            _, *scales = gaussian(params[rows], None, scale, soft_clip, "tarflow")
            sigma, log_sigma = (value.to(z.dtype) for value in scales)
            spread, terms = sigma * z[rows], (x[rows], new[rows], log_sigma)
            terms = [take(term, order[rows]) for term in (*terms, spread)]
            stepped = model.step(rows, slice(0, T), *terms)
            new = new.index_copy(0, rows, take(stepped, rank[rows]))
        new = torch.where((done | (single[:, None] & ahead) | ~live[:, None])[..., None], x, new)
        sound = (new.abs().flatten(1).amax(1) <= limit) | ~live
        if not sound.all():
            if not (sound | ~single).all():
                check_solution(new, order)
            new = torch.where((sound[:, None] | done)[..., None], new, 0)
            single = single | ~sound
            limit = torch.where(single, torch.finfo(z.dtype).max, limit)
        x, front, residual = new, front + sound.int(), torch.where(live, change, residual)
        live = live & ~((change <= tol) & ~single) & (front < last)
    log_sigma = torch.zeros_like(x, dtype=accumulation_dtype(x.dtype))
    if params is not None:
        log_sigma = torch.where(unsolved[..., None], log_sigma, log_scales(params, scale, soft_clip))
    return Sweeps(x, log_sigma, passes, sweeps.cpu(), residual.max().item() if B else 0.0, int(single.sum()))
