"""Distances between images: to the nearest real emoji, between two sets of images, and bits of lossless files."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from starflow.seeds import generator

from .classifier import blur
from .real import SHIFT

# Standard deviation in pixels of the blur before images are compared by their pixels.
BLUR = 1.0
# Real images that are compared in full with a query, the factor by which images shrink to choose them, and queries of
# one step.
CANDIDATES, SHRINK, PART = 32, 4, 32
# Channels of the layers of the random network, and the grid over which its last features are averaged.
CHANNELS, GRID = (3, 32, 64, 32), 2


View = Callable[[torch.Tensor], torch.Tensor]


def blurred(x: torch.Tensor) -> torch.Tensor:
    """Return images (B, C, H / 2, W / 2) after a blur."""
    return F.avg_pool2d(blur(x, torch.full((len(x),), BLUR)), 2)


def as_it_is(x: torch.Tensor) -> torch.Tensor:
    """Return the images."""
    return x


def nearest(images: torch.Tensor, real: torch.Tensor, mirrored: torch.Tensor, view: View) -> tuple[torch.Tensor, ...]:
    """Return the real images that are nearest to queries, over small shifts and mirror images of the queries.

    Small images choose the candidates, which are then compared in full.

    Args:
        images: (B, C, H, W) queries, white is 0.
        real: (N, C, H, W) images, white is 0.
        mirrored: bool (N,) whether the mirror image of a real image counts too.
        view: function of images before they are compared.

    Returns:
        int64 (B, K) numbers of the real images, in no order, and their float32 (B, K) mean square differences.
    """
    flat, small = view(real).flatten(1), F.avg_pool2d(real, SHRINK).flatten(1)
    numbers, squares = [], []
    for part in images.split(PART):
        rough = _squares(part, small, mirrored, lambda x: F.avg_pool2d(x, SHRINK))
        chosen = rough.topk(min(CANDIDATES, len(real)), largest=False).indices
        numbers.append(chosen)
        squares.append(_squares(part, flat[chosen], mirrored[chosen], view))
    return torch.cat(numbers), torch.cat(squares)


def _squares(images: torch.Tensor, flat: torch.Tensor, mirrored: torch.Tensor, view: View) -> torch.Tensor:
    """Return (B, N) mean square differences to the rows (N, F) of `flat`, or to rows (B, N, F) of each query."""
    own, found, size = flat.square().sum(-1), [], images.shape[-1]
    for flipped in (False, True):
        padded = F.pad(images.flip(-1) if flipped else images, (SHIFT,) * 4)
        places = itertools.product(range(2 * SHIFT + 1), repeat=2)
        moved = [padded[..., down : down + size, across : across + size] for down, across in places]
        queries = torch.stack([view(x).flatten(1) for x in moved], 1)
        least = (queries.square().sum(-1, keepdim=True) - 2 * queries @ flat.mT).amin(1)
        found.append(least + (own.masked_fill(~mirrored, torch.inf) if flipped else own))
    return torch.minimum(*found).clamp(min=0) / flat.shape[-1]


@torch.no_grad()
def features(x: torch.Tensor) -> torch.Tensor:
    """Return float64 (N, F) features of a fixed random convolutional network, averaged over a grid."""
    random = generator(0)
    for before, after in itertools.pairwise(CHANNELS):
        weight = torch.randn(after, before, 3, 3, generator=random) * (2 / (9 * before)) ** 0.5
        x = F.conv2d(x, weight, stride=2, padding=1).abs()
    return F.adaptive_avg_pool2d(x, GRID).flatten(1).double()


def frechet(first: torch.Tensor, second: torch.Tensor, scale: torch.Tensor) -> float:
    """Return the Frechet distance of the Gaussians that have the moments of two sets of features.

    Args:
        first: (N, F) features.
        second: (M, F) features.
        scale: (F,) values by which the features are divided.
    """
    means, covariances = [], []
    for x in (first / scale, second / scale):
        means.append(x.mean(0))
        covariances.append(torch.cov(x.T).reshape(x.shape[1], x.shape[1]))
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    traces = covariances[0].trace() + covariances[1].trace()
    return ((means[0] - means[1]).square().sum() + traces - 2 * cross).item()


def lossless_bits(images: torch.Tensor, form: str, **options: bool) -> float:
    """Return the mean bits per pixel value of images in files.

    Args:
        images: uint8 (N, C, H, W) images.
        form: format of the files, such as "PNG".
        options: options of the format, see `PIL.Image.Image.save`.
    """
    total = 0
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())).save(buffer, form, **options)
        total += len(buffer.getvalue())
    return 8 * total / images.numel()
