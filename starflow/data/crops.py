"""Images of a fixed size: scaling, crops and mirror images."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from ..errors import DataError
from ..io.images import open_image
from .samples import Opened

Crop = Literal["center", "random"]
# A random crop has at least this fraction of the shorter side.
LEAST_FRACTION = 0.8


def read_image(path: Path, size: int, resize: bool) -> torch.Tensor:
    """Return a uint8 (3, size, size) image.

    Args:
        path: image file.
        size: side in pixels.
        resize: whether to scale the shorter side and to crop the center; without it the image must have that size.

    Raises:
        ImageError: the file is unreadable.
        DataError: the image is of an unsupported kind, or has another size.
    """
    return _pixels(_fitted(open_image(path), str(path), size, resize))


def fetch_image(opened: Opened, size: int, resize: bool, index: int) -> torch.Tensor:
    """Return a uint8 (3, size, size) image with a center crop, see `read_image`.

    Args:
        opened: images by index.
        size: side in pixels.
        resize: whether to scale and to crop.
        index: index of the image.
    """
    return _pixels(_fitted(*opened(index), size, resize))


def vary_image(
    opened: Opened, size: int, resize: bool, crop: Crop, flip: bool, index: int, random: torch.Generator
) -> torch.Tensor:
    """Return a random variant of an image for training, uint8 (3, size, size).

    Args:
        opened: images by index.
        size: side in pixels.
        resize: whether to scale and to crop.
        crop: "center", or "random" for a square of 80 % to 100 % of the shorter side at a random place.
        flip: whether to mirror half of the images.
        index: index of the image.
        random: source of the choices.
    """
    draws = torch.rand(4, generator=random, dtype=torch.float32, device="cpu").tolist()
    image, name = opened(index)
    if crop == "random" and resize:
        image = _random_crop(image, size, *draws[:3])
    pixels = _pixels(_fitted(image, name, size, resize))
    return pixels.flip(2) if flip and draws[3] < 0.5 else pixels


def _fitted(image: Image.Image, name: str, size: int, resize: bool) -> Image.Image:
    """Return the center crop of a scaled image; DataError if it has another size and may not be scaled."""
    if resize and image.size != (size, size):
        image = _scaled(image, size)
        left, top = ((side - size) // 2 for side in image.size)
        image = image.crop((left, top, left + size, top + size))
    if image.size != (size, size):
        raise DataError(
            f"{name}: {image.width}x{image.height} pixels, expected {size}x{size}; to scale and crop the images, train "
            "and encode take --set data.resize=true"
        )
    return image


def _scaled(image: Image.Image, shorter: int) -> Image.Image:
    """Return an image with a given shorter side: halved by means of 2x2 pixels, then scaled bicubically.

    Diffusion models (arXiv 2105.05233) prepare ImageNet in this way, so FIDs are comparable.
    """
    while min(image.size) >= 2 * shorter:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = shorter / min(image.size)
    return image.resize([max(shorter, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)


def _random_crop(image: Image.Image, size: int, *draws: float) -> Image.Image:
    """Return a square of an image; the draws from 0 to 1 give its side, column and row."""
    shorter = size + int(draws[0] * (int(size / LEAST_FRACTION) - size + 1))
    image = _scaled(image, shorter)
    left, top = (int(draw * (side - size + 1)) for draw, side in zip(draws[1:], image.size))
    return image.crop((left, top, left + size, top + size))


def _pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
