"""Training step of the 32x32x3 model, which older commits run too: it stands on the public functions alone."""

from __future__ import annotations

import torch

from starflow import FlowConfig

CONFIG = FlowConfig(image_size=32, image_channels=3, patch_size=2, channels=128, layers=(4, 4, 4, 4))


def own_loss(flow, images):
    """Return the same loss by our code."""
    return flow.loss(flow(images))


def trainer(module, loss, images):
    """Return a function that takes one training step."""
    optimizer = torch.optim.AdamW(module.parameters(), betas=(0.9, 0.95), lr=1e-6, weight_decay=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss(module, images).backward()
        optimizer.step()

    return step
