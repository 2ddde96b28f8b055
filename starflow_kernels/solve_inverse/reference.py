"""Inverse of any causal conditioner: the specification in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..affine_flow_inverse.reference import affine_flow_inverse


def sequential(
    conditioner: Callable, z: torch.Tensor, order: torch.Tensor, scale: str, soft_clip: float
) -> tuple[torch.Tensor, int]:
    """One pass a token: x_t = mu_t(x_<t) + sigma_t(x_<t) z_t; returns x and the number of passes."""
    x = torch.zeros_like(z)
    for t in order.tolist():
        x[:, t] = affine_flow_inverse(z[:, t], conditioner(x)[:, t], None, scale, soft_clip, "tarflow")
    return x, len(order)
