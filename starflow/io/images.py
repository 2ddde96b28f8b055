"""Images and grids of images as PNG files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import DataError, ImageError
from .files import write_atomically

MIN_GRID_PIXELS = 512
BACKGROUND = "white"
TIFF_BITS = 258
TIFF_PHOTOMETRIC = 262
TIFF_WHITE_IS_ZERO = 0


def open_image(source: Path | BinaryIO, name: str = "") -> Image.Image:
    """Return an image file as upright 8-bit RGB, the first frame of an animation.

    The EXIF orientation is applied. Transparent pixels are composited on white. 16-bit gray levels are scaled to
    8 bits and rounded. Color profiles are ignored. 32-bit integers and floats are refused: their range is not known.

    Args:
        source: image file, or a stream of its bytes.
        name: name of the image for messages, by default the path.

    Raises:
        ImageError: the file is unreadable.
        DataError: the file has 32-bit pixels.
    """
    path = name or source
    try:
        with Image.open(source) as file:
            image = ImageOps.exif_transpose(file)
            # Older versions of Pillow read 16-bit PNG in the mode of 32-bit integers.
            if image.mode.startswith("I;16") or (image.mode == "I" and file.format == "PNG"):
                return _from_16_bits(image, getattr(file, "tag_v2", {}))
            if image.mode in ("I", "F"):
                kind = "32-bit integers" if image.mode == "I" else "floats"
                raise DataError(f"{path}: pixels are {kind}, whose range is not known; save it with 8 or 16 bits")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
            return image.convert("RGB")
    except DataError:
        raise
    except UnidentifiedImageError:
        # Pillow's text names the stream in memory.
        raise ImageError(f"{path}: not a readable image (unknown format, or its beginning is damaged)") from None
    # Decoders of damaged files raise errors of any type.
    except Exception as error:
        raise ImageError(f"{path}: not a readable image ({error})") from None


def image_grid(images: torch.Tensor, columns: int) -> Image.Image:
    """Grid of images, one pixel apart; a small grid is enlarged by an integer factor.

    Args:
        images: (N, C, H, W) uint8, C 1 or 3.
        columns: images per row.

    Raises:
        DataError: there are no images, or no columns.
    """
    if not len(images) or columns < 1:
        raise DataError(f"a grid of {len(images)} images in {columns} columns: expected at least one of each")
    count, channels, height, width = images.shape
    rows = math.ceil(count / columns)
    shape = channels, rows * (height + 1) - 1, columns * (width + 1) - 1
    canvas = torch.full(shape, 255, dtype=torch.uint8, device="cpu")
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


def _from_16_bits(image: Image.Image, tiff: Mapping[int, Any]) -> Image.Image:
    """Return a gray image as RGB; `tiff` are the tags of a TIFF file."""
    levels = np.asarray(image).astype(np.int64)
    largest = 2 ** tiff.get(TIFF_BITS, (16,))[0] - 1
    hidden = levels == image.info.get("transparency", -1)
    if tiff.get(TIFF_PHOTOMETRIC) == TIFF_WHITE_IS_ZERO:
        levels = largest - levels
    levels[hidden] = largest
    return Image.fromarray(((levels * 255 + largest // 2) // largest).astype(np.uint8)).convert("RGB")


def _save(image: Image.Image, path: str | Path) -> None:
    write_atomically(Path(path), lambda temporary: image.save(temporary, format="PNG"))
