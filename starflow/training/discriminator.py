"""The patch discriminator of pix2pix (arXiv 1611.07004, section 3.2.2 and appendix 6.1.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

MAX_WIDENING = 8


class PatchDiscriminator(nn.Module):
    """One logit for each patch of an image (B, C, H, W): positive for a real one.

    Convolutions of 4x4: `layers` of stride 2, then two of stride 1; with 3 layers a patch is 70x70 pixels. The width
    starts at `width` and doubles up to 8 times that. Norms are over an image alone, so that a row does not depend on
    its batch.
    """

    def __init__(self, channels: int = 3, width: int = 64, layers: int = 3):
        super().__init__()
        widths = [width * min(2**i, MAX_WIDENING) for i in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            stride = 2 if i < layers else 1
            parts += [
                nn.Conv2d(widths[i - 1], widths[i], 4, stride=stride, padding=1),
                nn.InstanceNorm2d(widths[i], affine=True),
                nn.LeakyReLU(0.2),
            ]
        self.network = nn.Sequential(*parts, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 1, h, w) logits."""
        return self.network(x)


def hinge_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Loss of the discriminator for logits of real and decoded images (arXiv 1705.02894)."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
