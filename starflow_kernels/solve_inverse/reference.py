"""Inverse of a flow with any causal conditioner: the specification in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..affine_flow_inverse.reference import affine_flow_inverse


def sequential(
    conditioner: Callable, z: torch.Tensor, order: torch.Tensor, scale: str, soft_clip: float
) -> torch.Tensor:
    """Solve token by token, one pass each: x_t = mu_t(x_<t) + sigma_t(x_<t) z_t."""
    x = torch.zeros_like(z)
    for t in order.tolist():
        x[:, t] = affine_flow_inverse(z, conditioner(x), None, scale, soft_clip, "tarflow")[:, t]
    check_solution(x, order)
    return x


def check_solution(x: torch.Tensor, order: torch.Tensor) -> None:
    """Raise ValueError if x is not finite, naming the first such token of `order` and a sample."""
    bad = ~x.isfinite().all(-1)[:, order]
    if bad.any():
        token, sample = bad.T.nonzero()[0].tolist()
        raise ValueError(f"x, the result: values are not finite at token {order[token]} of sample {sample}")
