"""How exact a sample is: one parallel pass from it back to its noise, guidance included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .flow import Flow, Guidance


class Certificate(NamedTuple):
    """Largest and mean |map(x) - z| over the values of a batch, map the inverse of how x was made of z."""

    max: float
    mean: float


@torch.no_grad()
def certificate(
    flow: Flow,
    x: torch.Tensor,
    z: torch.Tensor,
    labels: torch.Tensor | None = None,
    text: torch.Tensor | None = None,
    guidance: Guidance = Guidance(),
    empty_text: torch.Tensor | None = None,
) -> Certificate | None:
    """Certificate of x = flow.inverse(z) with the same arguments.

    Under guidance the map is not flow(x): every block is evaluated on x with and without the condition, and z follows
    from the guided mean and standard deviation. None where a temperature acts, of which there is no parallel pass.
    """
    if guidance.weight and guidance.temperature != 1:
        return None
    grid, tokens = flow.grid(x), flow.tokens(x)
    contexts = flow.contexts(labels, text, x, guidance, empty_text)
    for i, (block, (context, guided)) in enumerate(zip(flow.blocks, contexts)):
        rotary = flow.rotary(i, grid, tokens)
        if not guided:
            tokens, _ = block(tokens, *context, rotary)
            continue
        twice = torch.cat([tokens, tokens])
        noise, log_scale = block(twice, *context, rotary, logdet="none")
        sigma = (-log_scale).exp().to(tokens.dtype)
        weight = guidance.weights(tokens.shape[1], block.spec.start, tokens.device).to(tokens.dtype).unsqueeze(-1)
        if block.spec.flip:
            weight = weight.flip(0)
        mu, sigma = _guided(twice - sigma * noise, sigma, weight, guidance.rule, block.spec.affine.scale)
        tokens = (tokens - mu) / sigma
    error = (flow.images(tokens, grid) - z).abs()
    return Certificate(error.max().item(), error.mean().item())


def combine(found: Sequence[tuple[Certificate, int]]) -> tuple[float, float] | tuple[None, None]:
    """Largest and mean error over batches of (certificate, rows); Nones of no batch."""
    if not found:
        return None, None
    rows = sum(count for _, count in found)
    return max(each.max for each, _ in found), sum(each.mean * count for each, count in found) / rows


def _guided(mu, sigma, weight, rule: str, scale: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Guided mean and standard deviation of rows [condition | no condition], see `affine_flow_inverse`."""
    (mu_c, mu_u), (sigma_c, sigma_u) = mu.chunk(2), sigma.chunk(2)
    if rule == "starflow":
        s = (sigma_c / sigma_u).clamp(max=1).square()
        precision = 1 + weight - weight * s
        return ((1 + weight) * mu_c - weight * s * mu_u) / precision, sigma_c / precision.sqrt()
    mu = mu_c + weight * (mu_c - mu_u)
    if scale == "unit":
        return mu, sigma_c
    # The constant inside softplus cancels: the weights of the two branches add up to one.
    raw_c, raw_u = (sigma_c.log(), sigma_u.log()) if scale == "exp" else (_softplus_inverse(s) for s in sigma.chunk(2))
    raw = raw_c + weight * (raw_c - raw_u)
    return mu, raw.exp() if scale == "exp" else torch.logaddexp(raw, torch.zeros_like(raw))


def _softplus_inverse(sigma: torch.Tensor) -> torch.Tensor:
    return sigma + torch.log(-torch.expm1(-sigma))
