"""The real emoji that samples are judged by, and which of them look the same."""

from __future__ import annotations

import dataclasses
import functools
import hashlib

import torch

from starflow.data.emoji import Emoji, EmojiImages, catalogue, draw, find_font, may_flip

# Largest shift of an emoji in training, in pixels; it is drawn with a margin of that width.
SHIFT = 2


@dataclasses.dataclass(frozen=True)
class RealEmoji:
    """All emoji that a font draws, on white.

    Args:
        emoji: the emoji, sorted by name.
        images: uint8 (N, 3, size, size) images.
    """

    emoji: list[Emoji]
    images: torch.Tensor

    @functools.cached_property
    def same(self) -> list[int]:
        """Return the number of the first emoji with the same image, for each emoji."""
        first: dict[bytes, int] = {}
        return [first.setdefault(image.numpy().tobytes(), i) for i, image in enumerate(self.images)]

    def __len__(self) -> int:
        return len(self.emoji)

    def numbers(self, held_out: bool) -> list[int]:
        """Return the numbers of the training emoji, or of the held-out ones."""
        return [i for i, one in enumerate(self.emoji) if one.held_out == held_out]

    def alike(self, number: int) -> list[Emoji]:
        """Return the emoji with the same image as an emoji, with itself."""
        return [one for one, same in zip(self.emoji, self.same) if same == self.same[number]]

    def mirrored(self) -> torch.Tensor:
        """Return bool (N,): whether the mirror image of an emoji has its meaning."""
        return torch.tensor([may_flip(one) for one in self.emoji])

    def digest(self) -> str:
        """Return a digest of names and images, and of which of them may be mirrored."""
        names = "\n".join(one.name for one in self.emoji)
        content = names.encode() + self.images.numpy().tobytes() + self.mirrored().numpy().tobytes()
        return hashlib.sha256(content).hexdigest()[:16]


def real_emoji(font: str, size: int, shift: int = SHIFT) -> RealEmoji:
    """Return the emoji of a font.

    Args:
        font: font file; empty for the one that fontconfig finds.
        size: side of the images in pixels.
        shift: width of the margin in pixels.
    """
    drawn = draw(find_font(font), size - 2 * shift)
    emoji = [one for one in catalogue() if one.text in drawn]
    fetch = EmojiImages(emoji, drawn, 1, ("white",), shift, False, ("{}",), 0, 0)
    return RealEmoji(emoji, torch.stack([fetch.image(number) for number in range(len(emoji))]))


def ink(images: torch.Tensor) -> torch.Tensor:
    """Return float32 images on [0, 1] in which white is 0, so that padding with zeros continues the background."""
    return 1 - images.float() / 255
