"""Small flows with heads that are not zero."""

from __future__ import annotations

import torch

from starflow import Flow, FlowConfig

CONFIG = {
    "image_size": 8,
    "image_channels": 3,
    "patch_size": 2,
    "channels": 32,
    "layers": (1, 2),
    "head_dim": 16,
    "num_classes": 4,
    "start": True,
    "noise_std": 0.1,
}


def make(**changes) -> Flow:
    """Return a flow in eval mode, the same one at every call."""
    torch.manual_seed(0)
    flow = Flow(FlowConfig(**{**CONFIG, **changes}))
    random = torch.Generator("cpu").manual_seed(0)
    for parameter in flow.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=random), alpha=0.05)
    return flow.eval()
