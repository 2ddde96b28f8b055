"""The patch discriminator of pix2pix (arXiv 1611.07004, section 3.2.2 and appendix 6.1.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

MAX_WIDENING = 8


class PatchDiscriminator(nn.Module):
    """Discriminator with one logit per patch of an image, positive for a real one.

    It has `layers` 4x4 convolutions of stride 2, then two of stride 1. With 3 layers, a patch is 70x70 pixels. Norms
    are per image, so that a result does not depend on the batch.

    Args:
        channels: channels of the images.
        width: channels of the first convolution. They double per layer, up to 8 times `width`.
        layers: convolutions of stride 2.
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
        """Return (B, 1, h, w) logits.

        Args:
            x: (B, C, H, W) images on [-1, 1].
        """
        return self.network(x)


def hinge_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Return the loss of the discriminator (arXiv 1705.02894).

    Args:
        real: logits of real images.
        fake: logits of decoded images.
    """
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
