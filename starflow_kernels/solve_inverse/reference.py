"""Inverse of a flow with any causal conditioner: the specification in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .._core.numerics import accumulation_dtype
from ..affine_flow.reference import raw_outputs, sigma_of
from ..affine_flow_inverse.reference import affine_flow_inverse


class Tokens(NamedTuple):
    """Tokens to solve for.

    order: (B, T) int64 numbers of the tokens in the order in which they depend on each other. rank: (B, T) place of
    each token in it. first: (B,) number of tokens in it that are given. last: (B,) number of tokens that belong to the
    sample. Those between are solved.
    """

    order: torch.Tensor
    rank: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor

    @property
    def solved(self) -> torch.Tensor:
        """(B, T) whether a token is solved."""
        return (self.rank >= self.first[:, None]) & (self.rank < self.last[:, None])


def sequential(
    conditioner: Callable, z: torch.Tensor, x: torch.Tensor, tokens: Tokens, scale: str, soft_clip: float
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Solve token by token, one pass each: x_t = mu_t(x_<t) + sigma_t(x_<t) z_t.

    x (B, T, D) holds the given tokens. Return it with log sigma of the solved ones and the number of passes.
    """
    log_sigma = torch.zeros_like(x, dtype=accumulation_dtype(x.dtype))
    if not len(z):
        return x, log_sigma, 0
    steps = range(int(tokens.first.min()), max(int(tokens.first.min()), int(tokens.last.max())))
    for step in steps:
        params = conditioner(x, None)
        value = affine_flow_inverse(z, params, None, scale, soft_clip, "tarflow")
        solved = (tokens.first <= step) & (step < tokens.last)
        rows, t = solved.nonzero().squeeze(1), tokens.order[solved, step]
        x[rows, t] = value[rows, t]
        log_sigma[rows, t] = log_scales(params, scale, soft_clip)[rows, t]
    check_solution(x, tokens.order)
    return x, log_sigma, len(steps)


def log_scales(params: torch.Tensor, scale: str, soft_clip: float) -> torch.Tensor:
    """Return log sigma (B, T, D) of raw parameters."""
    return sigma_of(*raw_outputs(params, scale, soft_clip), scale)[1]


def check_solution(x: torch.Tensor, order: torch.Tensor) -> None:
    """Raise ValueError if x is not finite, naming the first such token in `order` (B, T) and a sample."""
    bad = ~x.isfinite().all(-1).gather(1, order)
    if bad.any():
        place, sample = bad.T.nonzero()[0].tolist()
        raise ValueError(f"x, the result: values are not finite at token {order[sample, place]} of sample {sample}")
