"""Inverse affine transform with guidance: the specification in plain PyTorch."""

from __future__ import annotations

import torch

from .._core.numerics import accumulation_dtype
from ..affine_flow.reference import raw_outputs, sigma_of


def guided(
    params: torch.Tensor, guidance: torch.Tensor, scale: str, soft_clip: float, rule: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the guided mu, sigma and log sigma.

    params: rows [condition | no condition]; guidance: weight per row and token.
    """
    w = guidance.to(accumulation_dtype(params.dtype)).unsqueeze(-1)
    a, b = raw_outputs(params, scale, soft_clip)
    if rule == "tarflow":
        b_c, b_u = b.chunk(2)
        mu = b_c + w * (b_c - b_u)
        if a is not None:
            a_c, a_u = a.chunk(2)
            a = a_c + w * (a_c - a_u)
        return mu, *sigma_of(a, mu, scale)
    sigma, log_sigma = sigma_of(a, b, scale)
    (mu_c, mu_u), (sigma_c, sigma_u) = b.chunk(2), sigma.chunk(2)
    if rule == "itarflow":
        sigma = sigma_c + w * (sigma_c - sigma_u)
        return mu_c + w * (mu_c - mu_u), sigma, sigma.abs().log()
    s = (sigma_c / sigma_u).clamp(max=1).square()
    precision = 1 + w - w * s
    mu = ((1 + w) * mu_c - w * s * mu_u) / precision
    return mu, sigma_c / precision.sqrt(), log_sigma.chunk(2)[0] - 0.5 * precision.log()


def gaussian(
    params: torch.Tensor, guidance: torch.Tensor | None, scale: str, soft_clip: float, rule: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return mu, sigma and log sigma, guided where `guidance` is given."""
    if guidance is not None:
        return guided(params, guidance, scale, soft_clip, rule)
    a, mu = raw_outputs(params, scale, soft_clip)
    return mu, *sigma_of(a, mu, scale)


def affine_flow_inverse(
    z: torch.Tensor, params: torch.Tensor, guidance: torch.Tensor | None, scale: str, soft_clip: float, rule: str
) -> torch.Tensor:
    """Return x = mu + sigma z."""
    mu, sigma, _ = gaussian(params, guidance, scale, soft_clip, rule)
    return (mu + sigma * z).to(z.dtype)


def affine_flow_inverse_out(z, params, guidance, scale, soft_clip, rule, out) -> None:
    """Write x = mu + sigma z into `out`."""
    out.copy_(affine_flow_inverse(z, params, guidance, scale, soft_clip, rule))
