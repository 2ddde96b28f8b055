"""Flow block in both directions, with the transformer of network.py: the specification in plain PyTorch."""

from __future__ import annotations

import torch

from ..affine_flow.reference import by_token
from ..affine_flow_inverse.reference import affine_flow_inverse
from ..spec import BlockSpec
from .network import CachedNetwork, compose, hidden_states, raw_params
from .progress import report
from .quantize import fake_quantize


def block_forward(x, weights, cond, prefix, cos, sin, spec_json: str, logdet: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the noise and log-determinant of data."""
    return compose(x, weights, cond, prefix, cos, sin, BlockSpec.from_json(spec_json), logdet)


def block_params(x, weights, cond, prefix, cos, sin, spec_json: str) -> torch.Tensor:
    """Return the raw parameters (B, T, P) of all tokens, in the order of x."""
    spec = BlockSpec.from_json(spec_json)
    w = dict(zip(spec.weight_shapes, weights))
    params = raw_params(hidden_states(x, w, spec, cond, prefix, cos, sin), w, spec).to(x.dtype)
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
) -> torch.Tensor:
    """Map noise to data, token by token; of each row, z holds the data of the first `known` tokens."""
    weights = fake_quantize(BlockSpec.from_json(spec_json), weights, quantize)
    network = CachedNetwork(z, weights, cond, prefix, cos, sin, guidance, spec_json, temperature)
    spec, (B, T, _) = network.spec, z.shape
    x = z.flip(1) if spec.flip else z.clone()
    first = max(0 if spec.start else 1, 0 if known is None or not B else int(known.min()))
    network.fill(x, first)
    for t in range(first, T):
        value = affine_flow_inverse(
            x[:, t : t + 1],
            network.params(x, t),
            None if guidance is None else guidance[:, t : t + 1],
            spec.affine.scale,
            spec.affine.soft_clip,
            rule,
        )
        x[:, t : t + 1] = value if known is None else torch.where((known > t)[:, None, None], x[:, t : t + 1], value)
        report(B * (t + 1), B * T)
    return x.flip(1) if spec.flip else x
