"""Exactness of a sample: one parallel pass maps it back to its noise, guidance included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from starflow_kernels.affine_flow_inverse.reference import gaussian

from .flow import Flow
from .guidance import Guidance
from .hooks import with_forward_hooks


class Certificate(NamedTuple):
    """Largest and mean |map(x) - z| over the values of a batch, where x was sampled as the inverse of map at z."""

    max: float
    mean: float


@torch.no_grad()
@with_forward_hooks
def certificate(
    flow: Flow,
    x: torch.Tensor,
    z: torch.Tensor,
    labels: torch.Tensor | None = None,
    text: torch.Tensor | None = None,
    guidance: Guidance = Guidance(),
    empty_text: torch.Tensor | None = None,
) -> Certificate | None:
    """Certify x = flow.inverse(z) with the same arguments.

    Under guidance the map is not flow(x): each block computes its parameters with and without the condition, and z
    follows from the guided mean and standard deviation.

    Args:
        flow: the flow.
        x: (B, C, H, W) samples.
        z: (B, C, H, W) their noise.
        labels: (B,) int64 classes, as in `Flow.inverse`.
        text: (B, L, text_dim) text states, as in `Flow.inverse`.
        guidance: guidance of the samples.
        empty_text: states of the prompt that guidance moves away from, as in `Flow.inverse`.

    Returns:
        The certificate, or None for an attention temperature other than 1, which has no parallel pass.
    """
    if guidance.weight and guidance.temperature != 1:
        return None
    grid, tokens = flow.grid(x), flow.tokens(x)
    contexts = flow.contexts(labels, text, x, guidance, empty_text)
    for i, (block, (context, guided)) in enumerate(zip(flow.blocks, contexts)):
        rotary, spec = flow.rotary(i, grid, tokens), block.spec
        if not guided:
            tokens, _ = block(tokens, *context, rotary)
            continue
        params = block.params(tokens.repeat(2, 1, 1), *context, rotary)
        weight = guidance.weights(tokens.shape[1], spec.start, tokens.device)
        weight = weight.flip(0) if spec.flip else weight
        mu, sigma, _ = gaussian(params, weight, spec.affine.scale, spec.affine.soft_clip, guidance.rule)
        tokens = ((tokens - mu) / sigma).to(tokens.dtype)
    error = (flow.images(tokens, grid) - z).abs()
    if not error.numel():
        return Certificate(0.0, 0.0)
    return Certificate(error.max().item(), error.mean().item())


def combine(batches: Sequence[tuple[Certificate, int]]) -> tuple[float, float] | tuple[None, None]:
    """Return the largest and mean error over batches of (certificate, rows), Nones for no batch."""
    if not batches:
        return None, None
    rows = sum(count for _, count in batches)
    return max(each.max for each, _ in batches), sum(each.mean * count for each, count in batches) / rows
