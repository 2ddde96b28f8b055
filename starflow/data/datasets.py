"""Data sets: digits and crops of two photographs of scikit-learn, emoji, images in files, and caches of latents."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from ..errors import ConfigError, DataError
from ..io.digests import digest
from ..models.autoencoder import downsampling
from ..seeds import check_seed, normal
from ..settings import check_types
from .crops import Crop, fetch_image, vary_image
from .emoji import Emoji, EmojiImages, catalogue, check_backgrounds, concept_names, draw, emoji_state, find_font
from .folders import folder_state, is_held_out, read_folder
from .latents import INDEX, LatentSet, load_latents
from .reading import readable_row
from .samples import caption_row, opened_row
from .tables import read_table, table_state
from .tars import read_tars, tar_state

Source = Literal["digits", "photos", "emoji", "folder", "webdataset", "huggingface", "latents"]
# Sources of images in files, which may have any size.
FILES = ("folder", "webdataset", "huggingface")
# Setting -> sources that it goes with. The others go with every source.
SOURCES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("language", "backgrounds", "variants", "shift", "plain_repeats", "paraphrases", "validation"), ("emoji",)
    ),
    "flip": ("emoji", *FILES),
    "crop": FILES,
    **dict.fromkeys(("image_column", "label_column", "caption_column", "split"), ("huggingface",)),
}
DIGITS_SIZE = 8
DIGITS_HELD_OUT = 360
PHOTO_HELD_OUT_COLUMNS = 128


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Images to train on and to hold out.

    Args:
        source: one of seven sources.
            "digits": 1797 images of 8x8 pixels, 17 levels and 10 classes; 360 of them, stratified, are held out.
            A `size` other than 8 scales them bilinearly, to three channels of 256 levels.
            "photos": crops of two photographs, one per class; the right 128 columns are held out.
            "emoji": emoji and their names, drawn with a color-emoji font. A tenth of the combinations of concept, skin
            tone and gender is held out, whatever `held_out` and `seed` are. The classes are the concepts.
            "folder": images such as path/CLASS/*.png, read by `open_image`. Hidden files and folders, and those of
            `folders.IGNORED_NAMES`, are ignored. Folders without images are no classes.
            "webdataset": a tar file, or a folder of tar files, whose members KEY.png (or .jpg, ...), KEY.cls (number of
            the class) and KEY.txt (caption) are a sample; KEY.json may hold `label` and `caption` in their place.
            "huggingface": a data set of the package datasets.
            "latents": a cache that `starflow encode` wrote.
        path: folder or file of the source; font file of the emoji, which fontconfig finds without one; folder of
            `Dataset.save_to_disk`, or name on the Hugging Face hub.
        size: side of the images in pixels, or of the latents.
        resize: whether to scale images in files to `size` and to crop them; without it they must have that size.
        crop: "center" crops the center; "random" lets training take a square of 80 % to 100 % of the shorter side.
        held_out: expected held-out fraction of a folder. Whether an image is held out depends on its path in the
            folder and the seed alone, so that other images may be added or removed.
        seed: seed for the choice of held-out images.
        class_names: names of the classes in captions, empty for the names in the source.
        templates: captions of each image, with "{}" in place of the name of its class or emoji. A folder with a
            metadata.jsonl has the captions in that file instead: JSON per line, with `file_name` relative to the folder
            and `text`.
        language: language of the names of emoji, such as "de" or "fr".
        backgrounds: colors behind the emoji, names such as "white" or forms such as "#ffcc00".
        variants: images per emoji for training. The first one is centered on the first background; those after it have
            random backgrounds, shifts and mirror images, which depend on `seed`. A caption names a background other
            than the first one ("red heart on navy"). Held-out emoji have the first variant alone.
        shift: largest shift of an emoji in pixels. It is drawn with a margin of that width.
        flip: whether training mirrors half of the images, and `starflow encode` writes the mirror images too. Of emoji,
            half of those whose meaning a mirror does not change are mirrored.
        plain_repeats: times that an emoji without skin tone is in the training set, nearly half of which are the few
            concepts with tones.
        paraphrases: further captions per emoji, in English: other names, words left out or in another order.
        validation: whether to leave emoji for validation out of training; they then take the place of those held out.
        image_column: column of the images of the source "huggingface".
        label_column: column of the classes; empty for none.
        caption_column: column of the captions; empty for captions made of class names.
        split: part of a data set that has several.
    """

    source: Source = "digits"
    path: str = ""
    size: int = 8
    resize: bool = False
    crop: Crop = "center"
    held_out: float = 0.1
    seed: int = 0
    class_names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ("{}",)
    language: str = "en"
    backgrounds: tuple[str, ...] = ("white",)
    variants: int = 1
    shift: int = 0
    flip: bool = False
    plain_repeats: int = 1
    paraphrases: int = 0
    validation: bool = False
    image_column: str = "image"
    label_column: str = ""
    caption_column: str = ""
    split: str = "train"

    def __post_init__(self):
        check_types(self)
        if self.source != "emoji" and (self.source in (*FILES, "latents")) != bool(self.path):
            raise ConfigError(
                f"path={self.path!r}: expected with the sources {', '.join(FILES)}, latents, and only there"
            )
        if self.size < 1:
            raise ConfigError(f"size={self.size} is not a number of pixels")
        if not self.templates or any(template.count("{}") != 1 for template in self.templates):
            raise ConfigError(f"templates={list(self.templates)}: expected texts with one {{}} for the class name")
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out={self.held_out} is not a fraction of at least 0 and below 1")
        check_seed(self.seed)
        for field in dataclasses.fields(self):
            sources = SOURCES.get(field.name, (self.source,))
            if self.source not in sources and getattr(self, field.name) != field.default:
                goes_with = " or ".join(map(repr, sources))
                raise ConfigError(f"{field.name} goes with source {goes_with}, not {self.source!r}")
        if self.crop == "random" and not self.resize:
            raise ConfigError("crop='random': needs resize=true")
        for name in ("variants", "plain_repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected at least 1")
        if not 0 <= 2 * self.shift < self.size:
            raise ConfigError(f"shift={self.shift}: expected less than half of size={self.size}")
        if self.paraphrases < 0 or (self.paraphrases and self.language != "en"):
            raise ConfigError(
                f"paraphrases={self.paraphrases}, language={self.language!r}: expected at least 0, or 0 for a "
                "language other than 'en'"
            )
        check_backgrounds(self.backgrounds)


@dataclasses.dataclass(frozen=True)
class ImageSet(Dataset):
    """Data set of images: a row is an image and its class.

    Args:
        fetch: function that returns an image by index, uint8 (C, H, W) with values below `levels`.
        labels: int64 (N,) classes.
        levels: gray levels.
        classes: names of the classes.
        captions: function that returns the captions of an image by index, the same number for each image.
        vary: function that returns a random variant of an image for training, by index and generator; None without.
    """

    fetch: Callable[[int], torch.Tensor]
    labels: torch.Tensor
    levels: int
    classes: tuple[str, ...]
    captions: Callable[[int], tuple[str, ...]]
    vary: Callable[[int, torch.Generator], torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.fetch(index), self.labels[index]


def load(config: DataConfig) -> tuple[ImageSet, ImageSet] | tuple[LatentSet, LatentSet]:
    """Return training and held-out images, or latents.

    Args:
        config: images to load.

    Raises:
        DataError: the data are missing or unreadable.
        ConfigError: the settings do not fit the data.
    """
    if config.source == "latents":
        return load_latents(Path(config.path), config.size)
    return {"digits": _digits, "photos": _photos, "emoji": _emoji}.get(config.source, _files)(config)


def data_state(config: DataConfig) -> dict[str, int | str]:
    """Return a description of the files behind a data set, by which a change is noticed; empty without files.

    Args:
        config: images to describe.

    Raises:
        DataError: a file is unreadable.
    """
    if config.source == "folder":
        return folder_state(Path(config.path))
    if config.source == "webdataset":
        return tar_state(Path(config.path))
    if config.source == "huggingface":
        return table_state(config.path, config.split)
    if config.source == "emoji":
        return emoji_state(find_font(config.path), config.language, config.size - 2 * config.shift)
    return {"digest": digest(Path(config.path) / INDEX)[:16]} if config.source == "latents" else {}


def dequantize(images: torch.Tensor, levels: int, noise_std: float, random: torch.Generator) -> torch.Tensor:
    """Return float32 images on [-1, 1] with noise (arXiv 2412.06329, sections 2.4 and 3).

    Args:
        images: integer gray levels k.
        levels: number of gray levels.
        noise_std: standard deviation of Gaussian noise on k / (levels - 1) * 2 - 1. With 0, the result is uniformly
            dequantized, (k + u) / levels * 2 - 1.
        random: source of the noise.
    """
    k = images.float()
    if noise_std == 0:
        return (k + torch.rand(k.shape, generator=random, dtype=torch.float32, device="cpu")) / levels * 2 - 1
    return k / (levels - 1) * 2 - 1 + noise_std * normal(k.shape, random)


def to_pixels(images: torch.Tensor, levels: int, noise_std: float) -> torch.Tensor:
    """Return uint8 pixel values 0 .. 255, the inverse of `dequantize` up to the noise.

    Args:
        images: images on [-1, 1].
        levels: number of gray levels.
        noise_std: `noise_std` of `dequantize`.
    """
    unit = (images.float().cpu() + 1) / 2
    k = (unit * levels).floor() if noise_std == 0 else (unit * (levels - 1)).round()
    return (k.clamp(0, levels - 1) * (255 / (levels - 1))).round().to(torch.uint8)


def check_autoencoder_input(vae: Any, images: ImageSet | LatentSet, size: int) -> None:
    """Check that an autoencoder takes images of this kind.

    Args:
        vae: AutoencoderKL.
        images: data set.
        size: side of the images in pixels.

    Raises:
        ConfigError: the data are latents, or their size or number of channels does not fit.
    """
    if not images.levels:
        raise ConfigError("data: latents, but an autoencoder takes images")
    if size % downsampling(vae):
        raise ConfigError(f"data.size={size}: the autoencoder makes latents of 1/{downsampling(vae)} of the side")
    channels = readable_row(images, 0)[0].shape[0]
    if channels not in (1, vae.config.in_channels):
        raise ConfigError(f"the autoencoder takes {vae.config.in_channels} channels, the images have {channels}")


def _digits(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images, levels = torch.from_numpy(digits.images).unsqueeze(1), 17
    if config.size != DIGITS_SIZE:
        images, levels = (images * (255 / 16)).expand(-1, 3, -1, -1), 256
        images = F.interpolate(images, (config.size, config.size), mode="bilinear").round()
    images = images.to(torch.uint8)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    # scikit-learn takes seeds of 32 bits.
    random = config.seed % 2**32
    parts = train_test_split(np.arange(len(labels)), test_size=DIGITS_HELD_OUT, random_state=random, stratify=labels)
    classes = tuple(map(str, range(10)))
    return tuple(_class_set(partial(_row, images[part]), labels[part], levels, classes, config) for part in parts)


def _class_set(fetch, labels: torch.Tensor, levels: int, classes: tuple[str, ...], config: DataConfig) -> ImageSet:
    names = config.class_names or classes
    if len(names) != len(classes):
        raise ConfigError(f"data: {len(names)} class_names, the data has {len(classes)} classes")
    captions = [tuple(template.replace("{}", name) for template in config.templates) for name in names]
    return ImageSet(fetch, labels, levels, classes, partial(_class_captions, captions, labels))


def _class_captions(captions: list[tuple[str, ...]], labels: torch.Tensor, index: int) -> tuple[str, ...]:
    return captions[int(labels[index])]


def _row(images: torch.Tensor, index: int) -> torch.Tensor:
    return images[index]


def _photos(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    from sklearn.datasets import load_sample_images

    size, photos = config.size, [torch.from_numpy(i.copy()).permute(2, 0, 1) for i in load_sample_images().images]
    height, width = photos[0].shape[1:]
    border = width - PHOTO_HELD_OUT_COLUMNS
    if not 1 <= size <= PHOTO_HELD_OUT_COLUMNS:
        raise DataError(f"photos: crops of size={size} do not fit the held-out {PHOTO_HELD_OUT_COLUMNS} columns")

    def crops(left: int, right: int, stride: int) -> ImageSet:
        corners = [
            (photo, top, column)
            for photo in range(len(photos))
            for top in range(0, height - size + 1, stride)
            for column in range(left, right - size + 1, stride)
        ]
        labels = torch.tensor([photo for photo, _, _ in corners], dtype=torch.int64, device="cpu")
        return _class_set(partial(_crop, photos, corners, size), labels, 256, ("china", "flower"), config)

    return crops(0, border, max(1, size // 8)), crops(border, width, size)


def _crop(photos: list[torch.Tensor], corners: list[tuple[int, int, int]], size: int, index: int) -> torch.Tensor:
    photo, top, column = corners[index]
    return photos[photo][:, top : top + size, column : column + size]


def _emoji(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    emoji = catalogue(config.language)
    drawn = draw(find_font(config.path), config.size - 2 * config.shift)
    names = concept_names(emoji)
    classes = tuple(sorted(names.values()))
    numbers = {name: number for number, name in enumerate(classes)}

    def image_set(part: list[Emoji], variants: int) -> ImageSet:
        part = [one for one in part if one.text in drawn]
        images = EmojiImages(
            part, drawn, variants, config.backgrounds, config.shift, config.flip, config.templates,
            config.paraphrases, config.seed,
        )  # fmt: skip
        labels = [numbers[names[one.concept]] for one in part for _ in range(variants)]
        labels = torch.tensor(labels, dtype=torch.int64, device="cpu")
        return ImageSet(images.image, labels, 256, classes, images.captions)

    test = [one for one in emoji if (one.for_validation if config.validation else one.held_out)]
    train = [one for one in emoji if not (one.held_out or one in test)]
    train = [one for one in train for _ in range(1 if one.tone else config.plain_repeats)]
    return image_set(train, config.variants), image_set(test, 1)


def _files(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    """Return the parts of the images in a folder, in tar files or in a table."""
    if config.source == "folder":
        samples = read_folder(Path(config.path))
    elif config.source == "webdataset":
        samples = read_tars(Path(config.path))
    else:
        columns = config.image_column, config.label_column, config.caption_column
        samples = read_table(config.path, config.split, *columns)
    parts: tuple[list[int], list[int]] = [], []
    for index, name in enumerate(samples.names):
        parts[is_held_out(name, config.held_out, config.seed)].append(index)
    labels = torch.tensor(samples.labels, dtype=torch.int64, device="cpu")

    def image_set(rows: list[int]) -> ImageSet:
        opened = partial(opened_row, samples.opened, rows)
        fetch = partial(fetch_image, opened, config.size, config.resize)
        images = _class_set(fetch, labels[rows], 256, samples.classes, config)
        vary = partial(vary_image, opened, config.size, config.resize, config.crop, config.flip)
        varied = vary if config.flip or config.crop != "center" else None
        caption = samples.caption and partial(caption_row, samples.caption, rows)
        return dataclasses.replace(images, vary=varied, captions=caption or images.captions)

    return image_set(parts[0]), image_set(parts[1])


def mirrored(images: ImageSet) -> ImageSet:
    """Return each image followed by its mirror image.

    Args:
        images: images to mirror.
    """
    return dataclasses.replace(
        images,
        fetch=partial(_fetch_mirrored, images.fetch),
        labels=images.labels.repeat_interleave(2),
        captions=partial(_captions_mirrored, images.captions),
        vary=None,
    )


def _fetch_mirrored(fetch: Callable[[int], torch.Tensor], index: int) -> torch.Tensor:
    image = fetch(index // 2)
    return image.flip(2) if index % 2 else image


def _captions_mirrored(captions: Callable[[int], tuple[str, ...]], index: int) -> tuple[str, ...]:
    return captions(index // 2)
