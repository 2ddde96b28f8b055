"""Flow block in both directions, with the transformer of network.py: the specification in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .._core.implicit import solve_transposed
from .._core.numerics import accumulation_dtype
from ..affine_flow.reference import by_token
from ..affine_flow_inverse.reference import gaussian
from ..spec import BlockSpec
from .network import CachedNetwork, compose, hidden_states, raw_params
from .progress import report
from .quantize import fake_quantize, linear_of


def block_forward(x, weights, cond, prefix, cos, sin, spec_json: str, logdet: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the noise and log-determinant of data."""
    return compose(x, weights, cond, prefix, cos, sin, BlockSpec.from_json(spec_json), logdet)


def block_params(x, weights, cond, prefix, cos, sin, spec_json: str, **operations) -> torch.Tensor:
    """Return the raw parameters (B, T, P) of all tokens, in the order of x; operations: see network.compose."""
    spec = BlockSpec.from_json(spec_json)
    w = dict(zip(spec.weight_shapes, weights))
    params = raw_params(hidden_states(x, w, spec, cond, prefix, cos, sin, **operations), w, spec).to(x.dtype)
    return by_token(params, not spec.start, spec.flip)


def block_inverse(
    z: torch.Tensor,
    weights: list[torch.Tensor],
    cond: torch.Tensor | None,
    prefix: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    guidance: torch.Tensor | None,
    spec_json: str,
    rule: str,
    temperature: float,
    quantize: str = "none",
    known: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Map noise to data, token by token; of each row, z holds the data of the first `known` tokens.

    Returns:
        x (B, T, D), and log sigma of every value that was computed, zero for the others.
    """
    weights = fake_quantize(BlockSpec.from_json(spec_json), weights, quantize)
    network = CachedNetwork(z, weights, cond, prefix, cos, sin, guidance, spec_json, temperature, linear_of(quantize))
    spec, (B, T, _) = network.spec, z.shape
    x = z.flip(1) if spec.flip else z.clone()
    first = max(0 if spec.start else 1, 0 if known is None or not B else int(known.min()))
    network.fill(x, first)
    log_sigma = torch.zeros(x.shape, dtype=accumulation_dtype(x.dtype), device=x.device)
    for t in range(first, T):
        at = slice(t, t + 1)
        weight = None if guidance is None else guidance[:, at]
        params, affine = network.params(x, t), spec.affine
        mu, sigma, log_scale = gaussian(params, weight, affine.scale, affine.soft_clip, rule)
        value = (mu + sigma * x[:, at]).to(x.dtype)
        given = torch.zeros(B, dtype=torch.bool, device=x.device) if known is None else known > t
        x[:, at] = torch.where(given[:, None, None], x[:, at], value)
        log_sigma[:, at] = log_scale.to(log_sigma.dtype).masked_fill(given[:, None, None], 0)
        report(B * (t + 1), B * T)
    return (x.flip(1), log_sigma.flip(1)) if spec.flip else (x, log_sigma)


def block_inverse_backward(
    x: torch.Tensor,
    g: torch.Tensor,
    weights: list[torch.Tensor],
    cond: torch.Tensor | None,
    prefix: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    spec_json: str,
    known: torch.Tensor | None = None,
    density: Callable = compose,
) -> torch.Tensor:
    """Solve J^T u = g for u (B, T, D), with J the Jacobian of block_forward at x (B, T, D).

    Args:
        x: result of `block_inverse`.
        g: (B, T, D) gradient of a loss with respect to x.
        weights: as in `block_inverse`, and so the next arguments.
        cond: condition.
        prefix: text states.
        cos: cosines.
        sin: sines.
        spec_json: the block.
        known: as in `block_inverse`; given tokens are equations of their own, x = data.
        density: `network.compose`, or a function with its arguments and results.
    """
    spec, T = BlockSpec.from_json(spec_json), x.shape[1]
    rank = torch.arange(T, dtype=torch.int64, device=x.device)
    rank = rank.flip(0) if spec.flip else rank
    given = None if known is None else rank < known[:, None]
    dtype = max(x.dtype, weights[0].dtype, key=lambda dtype: torch.finfo(dtype).eps)
    context = weights, cond, prefix, cos, sin, spec, "none"
    return solve_transposed(lambda x: density(x, *context), g, x, rank, given, dtype)
