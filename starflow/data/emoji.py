"""Emoji: their names, parts and split, and their images, drawn with a color-emoji font."""

from __future__ import annotations

import dataclasses
import functools
import re
import statistics
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont

from ..errors import ConfigError, DataError
from ..io.digests import digest
from ..seeds import generator
from .paraphrases import paraphrase

# Share held out of the emoji that may be held out, which is about 10 % of all; the share for validation comes next.
HELD_OUT, VALIDATION = 0.19, 0.095
INSTALL = "in Debian, apt install fonts-noto-color-emoji; or name a font file with --set data.path=FILE"
JOINER, STYLE = "\u200d", "\ufe0f"
TONES = {
    "\U0001f3fb": "light",
    "\U0001f3fc": "medium-light",
    "\U0001f3fd": "medium",
    "\U0001f3fe": "medium-dark",
    "\U0001f3ff": "dark",
}
SIGNS = {"♂": "male", "♀": "female"}
# Gendered character -> the neutral one.
MALE = {"👨": "🧑", "👦": "🧒", "👴": "🧓", "🤴": "🫅", "🫃": "🫄", "🎅": "🧑‍🎄", "🕺": "🕺"}
FEMALE = {"👩": "🧑", "👧": "🧒", "👵": "🧓", "👸": "🫅", "🤰": "🫄", "🤶": "🧑‍🎄", "💃": "🕺"}
# Character -> the sequence with the same meaning, in which each person may have a tone and a gender.
SEQUENCES = {
    "👫": "👩‍🤝‍👨",
    "👬": "👨‍🤝‍👨",
    "👭": "👩‍🤝‍👩",
    "💏": "🧑‍❤‍💋‍🧑",
    "💑": "🧑‍❤‍🧑",
    "👯": "🧑‍🐰‍🧑",
    "🤼": "🧑‍🫯‍🧑",
    "🤝": "🫱‍🫲",
}
# Concepts that face left, of which there are emoji that face right.
FACING_LEFT = {"🏃", "🚶", "🧎", "🧑‍🦯", "🧑‍🦼", "🧑‍🦽"}
# Words in names of emoji with text, digits or a direction. Flags and pairs of tones are recognized by their characters.
DIRECTED = re.compile(
    r"\b(left|right|facing|clock|counterclock|thirty|\S*watch|\S*arrow|keycap|button|symbol|sign|mark\b|moon|calendar"
    r"|tear-off|chart|abacus|input|hundred|bank|banknote|dollar|currency|money|receipt|\S*tickets?\b|\S*newspaper|store"
    r"|hotel|post office|copyright|registered|information|musical|medal|pool|zzz|question|circled|e-mail|taxi|bus stop"
    r"|aries|taurus|gemini|cancer|leo\b|virgo|libra|scorpio\b|sagittarius|capricorn|aquarius|pisces|ophiuchus|om\b"
    r"|yin|khanda|star and crescent|water closet|compass|\S*globe|world|map\b|label|\S*keyboard|slot machine|eighteen"
    r"|oncoming|name badge|ok hand|ruler|speedometer|flag|curly loop|double curly|mahjong|playing cards|joker|new\b)",
    re.IGNORECASE,
)


class Emoji(NamedTuple):
    """Characters, English name, caption and parts of an emoji, and whether it is held out or for validation.

    Args:
        text: the characters.
        name: English name in the CLDR, without punctuation.
        caption: name in the language of the captions.
        concept: characters without tones and genders; the color of hair is part of the concept.
        tone: skin tone such as "medium-dark", two different ones of two people as "light, dark", or "".
        gender: "male", "female", different ones of several people as "female, male", or "".
        held_out: whether the emoji is held out.
        for_validation: whether the emoji may be left out of training, to make choices by it.
    """

    text: str
    name: str
    caption: str
    concept: str
    tone: str
    gender: str
    held_out: bool = False
    for_validation: bool = False

    @property
    def is_flag(self) -> bool:
        """Whether the emoji is a flag of a country or region."""
        return self.text[0] == "\U0001f3f4" or "\U0001f1e6" <= self.text[0] <= "\U0001f1ff"


def catalogue(language: str = "en") -> list[Emoji]:
    """Return all fully qualified emoji, sorted by their English names.

    The split is a function of the names alone. Each concept, each tone and each gender keeps its plainest emoji in the
    training part: one without tone, without gender, then with the smallest hash of its name. Of the others, those
    whose hash is in the lowest 19 % are held out, and the next 9.5 % are for validation.

    Args:
        language: language of the captions, one of `emoji.LANGUAGES`. A name without translation stays English.

    Raises:
        ConfigError: the package emoji is missing, or has no names in this language.
    """
    try:
        import emoji
    except ImportError:
        raise ConfigError(
            "the source 'emoji' needs the names in the package emoji: pip install 'starflow-kernels[emoji]'"
        ) from None
    if language not in emoji.LANGUAGES:
        raise ConfigError(f"data: language={language!r}: expected one of {', '.join(sorted(emoji.LANGUAGES))}")
    emoji.config.load_language(language)
    found = []
    for text, entry in emoji.EMOJI_DATA.items():
        if entry["status"] == emoji.STATUS["fully_qualified"]:
            name = _plain(entry["en"])
            caption = _plain(entry[language]) if language in entry else name
            found.append(Emoji(text, name, caption, *parts(text)))
    found.sort(key=lambda one: one.name)
    plainest: dict[tuple[str, str], Emoji] = {}
    for one in sorted(found, key=_plainness):
        for part in ("concept", "tone", "gender"):
            plainest.setdefault((part, getattr(one, part)), one)
    kept = {one.name for one in plainest.values()}
    shares = [1.0 if one.name in kept else _hash(one.name) / 16**13 for one in found]
    return [
        one._replace(held_out=share < HELD_OUT, for_validation=HELD_OUT <= share < HELD_OUT + VALIDATION)
        for one, share in zip(found, shares)
    ]


def aliases(one: Emoji) -> list[str]:
    """Return other English names of an emoji, in lower case.

    Args:
        one: the emoji.
    """
    import emoji

    names = [_plain(alias).lower() for alias in emoji.EMOJI_DATA[one.text].get("alias", [])]
    return [name.removeprefix("flag for ") for name in names if name != one.name.lower()]


def concept_names(emoji: list[Emoji]) -> dict[str, str]:
    """Return the names of the concepts, each the name of its plainest emoji.

    Args:
        emoji: result of `catalogue`.
    """
    return {one.concept: one.name for one in sorted(emoji, key=_plainness, reverse=True)}


def parts(text: str) -> tuple[str, str, str]:
    """Return concept, tone and gender of an emoji, see `Emoji`.

    Args:
        text: characters of the emoji.
    """
    tones = [TONES[character] for character in text if character in TONES]
    text = "".join(character for character in text if character not in {STYLE, *TONES})
    joined = SEQUENCES.get(text, text).split(JOINER)
    people = joined[:1] + [character for character in joined[1:] if character not in SIGNS]
    genders = [
        SIGNS.get(character) or ("male" if character in MALE else "female")
        for character in joined
        if character in MALE or character in FEMALE or (character in SIGNS and len(joined) > 1)
    ]
    concept = JOINER.join(MALE.get(character) or FEMALE.get(character) or character for character in people)
    return SEQUENCES.get(concept, concept), _together(tones), _together(genders)


def may_flip(one: Emoji) -> bool:
    """Return whether the mirror image of an emoji has the same meaning.

    The meaning changes with text, digits, flags and directions, where the mirror image is another emoji, and where two
    people differ in tone: the name lists their tones from left to right.

    Args:
        one: the emoji.
    """
    directed = one.is_flag or "," in one.tone or one.concept in FACING_LEFT
    return not directed and not DIRECTED.search(one.name)


def find_font(path: str = "") -> Path:
    """Return the file of a color-emoji font.

    Args:
        path: font file; empty for the one that fontconfig's `fc-match` prefers.

    Raises:
        DataError: there is no such file, or no font for color emoji.
    """
    if path:
        if not Path(path).is_file():
            raise DataError(f"no font file {path}: {INSTALL}")
        return Path(path)
    command = ["fc-match", "--format=%{color} %{file}", "emoji:color=true"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        raise DataError(f"fontconfig's fc-match does not run, which finds a color-emoji font: {INSTALL}") from None
    is_color, _, file = answer.partition(" ")
    if is_color != "True":
        raise DataError(f"fontconfig knows no color-emoji font: {INSTALL}")
    return Path(file)


def draw(font: Path, side: int) -> dict[str, torch.Tensor]:
    """Return uint8 (4, side, side) images by the characters of the emoji, with colors multiplied by their opacity.

    Emoji that the font does not draw as one glyph are left out. All are drawn at the same scale.

    Args:
        font: font file.
        side: side of the images in pixels.

    Raises:
        DataError: the font is unreadable, or has no color emoji.
    """
    # The digest makes a changed file another key of the cache.
    return _draw(font.resolve(), digest(font), side)


@functools.lru_cache(maxsize=1)
def _draw(path: Path, content: str, side: int) -> dict[str, torch.Tensor]:
    font, texts = _open(path), [one.text for one in catalogue()]
    widths = {text: font.getlength(text) for text in texts}
    # A sequence that the font does not know is drawn as several glyphs, and most emoji as one.
    limit = 1.5 * statistics.mode(widths.values())
    boxes = {text: font.getbbox(text) for text in texts if widths[text] < limit}
    boxes = {text: box for text, box in boxes.items() if box[0] < box[2] and box[1] < box[3]}
    cell = max((round(max(right - left, bottom - top)) for left, top, right, bottom in boxes.values()), default=1)
    images, is_color = {}, False
    unknown = _glyph(font, "\U0010ffff", font.getbbox("\U0010ffff"), cell).tobytes()
    for text, box in boxes.items():
        image = _glyph(font, text, box, cell)
        if image.getbbox() and image.tobytes() != unknown:
            scaled = torch.from_numpy(np.array(image.resize((side, side), Image.Resampling.LANCZOS))).permute(2, 0, 1)
            # The filter overshoots at edges, where colors would exceed their opacity.
            images[text] = torch.minimum(scaled, scaled[3:])
            is_color = is_color or bool((scaled[:1] != scaled[1:3]).any())
    if not is_color:
        raise DataError(f"{path}: Pillow finds no color emoji in this font: {INSTALL}")
    return images


def emoji_state(font: Path, language: str, side: int) -> dict[str, int | str]:
    """Return the numbers of emoji that a font draws and does not draw, and digests of the font and of the captions.

    Args:
        font: font file.
        language: language of the captions.
        side: side of the images in pixels.
    """
    emoji, drawn = catalogue(language), draw(font, side)
    names = "".join(f"{one.text}\0{one.caption}\n" for one in emoji)
    return {
        "images": len(drawn),
        "skipped": len(emoji) - len(drawn),
        "font": digest(font)[:16],
        "names": digest(names.encode())[:16],
    }


@dataclasses.dataclass(frozen=True)
class EmojiImages:
    """Images and captions of emoji, `variants` of each.

    The first variant of an emoji is centered on the first background. The others are determined by the seed, the name
    of the emoji and the number of the variant. A caption names a background other than the first one.

    Args:
        emoji: the emoji.
        drawn: result of `draw` at the size that is left by `shift` on each side.
        variants: images per emoji.
        backgrounds: names of colors.
        shift: largest shift in pixels, horizontally and vertically.
        flip: whether to mirror half of those that `may_flip`.
        templates: captions, with "{}" in place of the name.
        paraphrases: further captions, see `paraphrase`.
        seed: seed of the variants and paraphrases.
    """

    emoji: list[Emoji]
    drawn: dict[str, torch.Tensor]
    variants: int
    backgrounds: tuple[str, ...]
    shift: int
    flip: bool
    templates: tuple[str, ...]
    paraphrases: int
    seed: int

    def image(self, index: int) -> torch.Tensor:
        """Return a uint8 (3, size, size) image.

        Args:
            index: number of the emoji times `variants`, plus the number of the variant.
        """
        one = self.emoji[index // self.variants]
        background, down, across, flipped = self._variant(index)
        layer = self.drawn[one.text]
        layer = layer.flip(-1) if flipped else layer
        size, side = layer.shape[-1] + 2 * self.shift, layer.shape[-1]
        color = torch.tensor(_color(self.backgrounds[background]), dtype=torch.int32, device="cpu").view(3, 1, 1)
        image = color.expand(3, size, size).to(torch.uint8)
        part = image[:, down : down + side, across : across + side]
        layer = layer.int()
        part.copy_(layer[:3] + (color * (255 - layer[3:]) + 127) // 255)
        return image

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions of an image.

        Args:
            index: index of the image.
        """
        one, variant = self.emoji[index // self.variants], index % self.variants
        background = self._variant(index)[0]
        ending = f" on {self.backgrounds[background]}" if background else ""
        captions = [template.replace("{}", one.caption + ending) for template in self.templates]
        others = aliases(one) if self.paraphrases else []
        for number in range(self.paraphrases):
            random = generator(self.seed, _hash(one.name), variant, number)
            captions.append(paraphrase(one, others, random) + ending)
        return tuple(captions)

    def _variant(self, index: int) -> tuple[int, int, int, bool]:
        """Return the number of the background, the offsets from the top and the left, and whether to mirror."""
        number, variant = divmod(index, self.variants)
        if not variant:
            return 0, self.shift, self.shift, False
        one = self.emoji[number]
        random = generator(self.seed, _hash(one.name), variant)
        limits = (len(self.backgrounds), 2 * self.shift + 1, 2 * self.shift + 1, 2)
        background, down, across, flipped = (
            int(torch.randint(limit, (), generator=random, dtype=torch.int64, device="cpu")) for limit in limits
        )
        return background, down, across, bool(flipped) and self.flip and may_flip(one)


def check_backgrounds(names: tuple[str, ...]) -> None:
    """Check that colors are known.

    Args:
        names: names of colors, or forms such as "#ffcc00".

    Raises:
        ConfigError: there is no color, or an unknown one.
    """
    if not names:
        raise ConfigError("backgrounds=(): expected at least one color")
    for name in names:
        try:
            _color(name)
        except ValueError:
            raise ConfigError(f"backgrounds: {name!r} is no color that Pillow knows") from None


@functools.cache
def _color(name: str) -> tuple[int, ...]:
    return ImageColor.getrgb(name)[:3]


def _open(path: Path) -> ImageFont.FreeTypeFont:
    # A bitmap font opens at its own sizes alone, an outline font at each.
    for size in range(160, 15, -1):
        try:
            return ImageFont.truetype(path, size)
        except OSError:
            continue
    raise DataError(f"{path}: no font that Pillow opens at a size from 16 to 160 pixels: {INSTALL}")


def _glyph(font: ImageFont.FreeTypeFont, text: str, box: tuple[float, ...], cell: int) -> Image.Image:
    """Return an image with premultiplied alpha, with the box in the center of the cell."""
    left, top, right, bottom = box
    corner = ((cell - left - right) // 2, (cell - top - bottom) // 2)
    image = Image.new("RGBA", (cell, cell))
    ImageDraw.Draw(image).text(corner, text, fill="black", font=font, embedded_color=True)
    return image.convert("RGBa")


def _plainness(one: Emoji) -> tuple[bool, bool, int]:
    return bool(one.tone), bool(one.gender), _hash(one.name)


def _plain(name: str) -> str:
    return name.strip(":").replace("_", " ")


def _together(values: list[str]) -> str:
    """Return the values of several people, one if they are the same."""
    return ", ".join(values if len(set(values)) > 1 else values[:1])


def _hash(name: str) -> int:
    return int(digest(name.encode())[:13], 16)
