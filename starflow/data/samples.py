"""Images in files, archives or tables, before they are split and scaled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from PIL import Image

# Function that returns an image by index, and its name for messages.
Opened = Callable[[int], tuple[Image.Image, str]]
# A class of this number or above is an error: the model and the list of names have an entry per class.
MAX_CLASSES = 2**20


@dataclasses.dataclass(frozen=True)
class Samples:
    """Images with classes and captions.

    Args:
        opened: images by index.
        names: name of each image, which decides whether it is held out.
        labels: class of each image.
        classes: names of the classes.
        caption: function that returns the caption of an image by index; None if captions are made of class names.
    """

    opened: Opened
    names: Sequence[str]
    labels: Sequence[int]
    classes: tuple[str, ...]
    caption: Callable[[int], str] | None = None


def opened_row(opened: Opened, rows: Sequence[int], index: int) -> tuple[Image.Image, str]:
    """Return an image of a part of the samples.

    Args:
        opened: images by index.
        rows: indices of the part.
        index: index within the part.
    """
    return opened(rows[index])


def caption_row(caption: Callable[[int], str], rows: Sequence[int], index: int) -> tuple[str, ...]:
    """Return the caption of an image of a part of the samples, as the only one.

    Args:
        caption: captions by index.
        rows: indices of the part.
        index: index within the part.
    """
    return (caption(rows[index]),)
