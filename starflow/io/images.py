"""Images and grids of images as PNG files."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from PIL import Image

from .files import write_atomically

MIN_GRID_PIXELS = 512


def image_grid(images: torch.Tensor, columns: int) -> Image.Image:
    """Grid of images, one pixel apart; a small grid is enlarged by an integer factor.

    Args:
        images: (N, C, H, W) uint8, C 1 or 3.
        columns: images per row.
    """
    count, channels, height, width = images.shape
    rows = math.ceil(count / columns)
    canvas = torch.full((channels, rows * (height + 1) - 1, columns * (width + 1) - 1), 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + 1), (i % columns) * (width + 1)
        canvas[:, top : top + height, left : left + width] = image
    return _image(canvas, max(1, MIN_GRID_PIXELS // canvas.shape[2]))


def save_grid(images: torch.Tensor, path: str | Path, columns: int = 10) -> None:
    """Write a grid of images as PNG.

    Args:
        images: (N, C, H, W) uint8, C 1 or 3.
        path: file to write.
        columns: images per row.
    """
    _save(image_grid(images, columns), path)


def save_image(image: torch.Tensor, path: str | Path) -> None:
    """Write a uint8 image (C, H, W), C 1 or 3, as PNG."""
    _save(_image(image), path)


def _image(pixels: torch.Tensor, scale: int = 1) -> Image.Image:
    enlarged = pixels.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    return Image.fromarray(enlarged.permute(1, 2, 0).squeeze(-1).numpy())


def _save(image: Image.Image, path: str | Path) -> None:
    write_atomically(Path(path), lambda temporary: image.save(temporary, format="PNG"))
