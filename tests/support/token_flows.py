"""Small flows on tokens and vectors, nowhere the identity, and what they take."""

from __future__ import annotations

import torch

from starflow import TokenFlow, TokenFlowConfig

SMALL = {"channels": 16, "layers": (1, 2, 1), "head_dim": 8}
ORDERS = ((3, 1, 0, 2, 4), (0, 1, 2, 3, 4), (4, 2, 0, 1, 3))
VARIANTS = {
    "vector": {"features": 5},
    "tokens": {"tokens": 5, "token_dim": 2},
    "one-token": {"features": 4, "token_dim": 4},
    "class": {"features": 5, "condition": "class", "num_classes": 3},
    "condition": {"features": 10, "token_dim": 2, "condition": "vector", "condition_dim": 3},
    "condition-per-token": {"tokens": 5, "token_dim": 2, "condition": "token", "condition_dim": 3},
    "orders": {"tokens": 5, "token_dim": 2, "orders": ORDERS},
    "no-positions": {"tokens": 5, "positions": False, "norm": "rms_norm", "mlp": "swiglu"},
    "adaptive": {
        **{"tokens": 5, "token_dim": 2, "condition": "token", "condition_dim": 3, "adaptive": True},
        **{"transition": 1.5, "lookahead": True, "qk_layer_norm": True},
    },
    "volume-preserving": {"features": 5, "scale": "unit"},
}
ROWS = 4


def make(name: str = "vector", **changes) -> TokenFlow:
    """Return a flow in float64 that is nowhere the identity; its heads stay tame."""
    torch.manual_seed(0)
    flow = TokenFlow(TokenFlowConfig(**{**SMALL, "soft_clip": 2.0, **VARIANTS[name], **changes})).double()
    for weight, parameter in flow.named_parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.04 if "proj_out" in weight else 0.15)
    for moment in flow.buffers():
        moment.uniform_(0.5, 2.0)
    return flow


def inputs(flow: TokenFlow, rows: int = ROWS):
    """Return data and the condition that the flow takes."""
    config, (tokens, token_dim) = flow.config, flow.config.token_shape
    x = torch.randn(rows, tokens, token_dim, dtype=torch.float64)
    per_row = {"vector": (rows,), "token": (rows, tokens)}.get(config.condition)
    condition = torch.arange(rows) % 4 - 1 if config.condition == "class" else None
    if per_row:
        condition = torch.randn(*per_row, config.condition_dim, dtype=torch.float64)
    return (x.flatten(1) if config.features else x), condition
