"""Data sets: digits and crops of two photographs of scikit-learn, emoji, folders of images, and caches of latents."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset

from ..errors import ConfigError, DataError
from ..io.digests import digest
from ..io.files import located
from ..io.images import open_image
from ..models.autoencoder import downsampling
from ..seeds import check_seed, normal
from ..settings import check_types
from .emoji import Emoji, EmojiImages, catalogue, check_backgrounds, concept_names, draw, emoji_state, find_font
from .folders import METADATA, folder_state, image_files, is_held_out, read_captions, relative_name
from .latents import INDEX, LatentSet, load_latents

Source = Literal["digits", "photos", "emoji", "folder", "latents"]
# Settings of the source "emoji" alone.
EMOJI_SETTINGS = (
    "language", "backgrounds", "variants", "shift", "flip", "plain_repeats", "paraphrases", "validation",
)  # fmt: skip
DIGITS_SIZE = 8
DIGITS_HELD_OUT = 360
PHOTO_HELD_OUT_COLUMNS = 128


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Images to train on and to hold out.

    Args:
        source: one of five sources.
            "digits": 1797 images of 8x8 pixels, 17 levels and 10 classes; 360 of them, stratified, are held out.
            A `size` other than 8 scales them bilinearly, to three channels of 256 levels.
            "photos": crops of two photographs, one per class; the right 128 columns are held out.
            "emoji": emoji and their names, drawn with a color-emoji font. A tenth of the combinations of concept, skin
            tone and gender is held out, whatever `held_out` and `seed` are. The classes are the concepts.
            "folder": images such as path/CLASS/*.png, read by `open_image`. Hidden files and folders, and those of
            `folders.IGNORED_NAMES`, are ignored. Folders without images are no classes.
            "latents": a cache that `starflow encode` wrote.
        path: folder of the source "folder" or "latents", or font file of the emoji; without one, fontconfig finds it.
        size: side of the images in pixels, or of the latents.
        resize: whether to scale images of a folder to `size` and to crop their center; without it they must have that
            size.
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
        flip: whether to mirror half of the emoji whose meaning a mirror does not change.
        plain_repeats: times that an emoji without skin tone is in the training set, nearly half of which are the few
            concepts with tones.
        paraphrases: further captions per emoji, in English: other names, words left out or in another order.
        validation: whether to leave emoji for validation out of training; they then take the place of those held out.
    """

    source: Source = "digits"
    path: str = ""
    size: int = 8
    resize: bool = False
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

    def __post_init__(self):
        check_types(self)
        if self.source != "emoji" and (self.source in ("folder", "latents")) != bool(self.path):
            raise ConfigError(f"path={self.path!r} goes with source 'folder' or 'latents', and only with them")
        if self.size < 1:
            raise ConfigError(f"size={self.size} is not a number of pixels")
        if not self.templates or any(template.count("{}") != 1 for template in self.templates):
            raise ConfigError(f"templates={list(self.templates)}: expected texts with one {{}} for the class name")
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out={self.held_out} is not a fraction of at least 0 and below 1")
        check_seed(self.seed)
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        changed = [name for name in EMOJI_SETTINGS if getattr(self, name) != defaults[name]]
        if self.source != "emoji" and changed:
            raise ConfigError(f"{', '.join(changed)} goes with source 'emoji', not {self.source!r}")
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
    """

    fetch: Callable[[int], torch.Tensor]
    labels: torch.Tensor
    levels: int
    classes: tuple[str, ...]
    captions: Callable[[int], tuple[str, ...]]

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
    return {"digits": _digits, "photos": _photos, "emoji": _emoji, "folder": _folder}[config.source](config)


def data_state(config: DataConfig) -> dict[str, int | str]:
    """Return a description of the files behind a data set, by which a change is noticed; empty without files.

    Args:
        config: images to describe.

    Raises:
        DataError: a file is unreadable.
    """
    if config.source == "folder":
        return folder_state(Path(config.path))
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
    channels = images[0][0].shape[0]
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


def _folder(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    root = Path(config.path)
    if not root.is_dir():
        raise DataError(
            f"no folder of images at {located(root)}: start where the path holds, or change it with --data FOLDER or "
            "--set data.path=FOLDER, whichever the command has"
        )
    texts = read_captions(root)
    # Captioned images need no class folders.
    by_class = image_files(root, flat=texts is not None)
    if not by_class:
        raise DataError(f"no images in {root}: expected {root}/CLASS/*.png (or .jpg, .webp, ...), or a {METADATA}")
    classes = tuple(by_class)
    parts: tuple[list, list] = [], []
    for label, paths in enumerate(by_class.values()):
        for path in paths:
            name = relative_name(root, path.relative_to(root))
            parts[is_held_out(name, config.held_out, config.seed)].append((path, name, label))

    def image_set(items: list[tuple[Path, str, int]]) -> ImageSet:
        labels = torch.tensor([label for _, _, label in items], dtype=torch.int64, device="cpu")
        fetch = partial(_read, [path for path, _, _ in items], config.size, config.resize)
        if texts is None:
            return _class_set(fetch, labels, 256, classes, config)
        if missing := [name for _, name, _ in items if name not in texts]:
            raise DataError(f"{root / METADATA}: no line for {missing[0]}")
        captions = [(texts[name],) for _, name, _ in items]
        return ImageSet(fetch, labels, 256, classes, captions.__getitem__)

    return image_set(parts[0]), image_set(parts[1])


def _read(paths: list[Path], size: int, resize: bool, index: int) -> torch.Tensor:
    return read_image(paths[index], size, resize)


def read_image(path: Path, size: int, resize: bool) -> torch.Tensor:
    """Return a uint8 (3, size, size) image.

    Args:
        path: image file.
        size: side in pixels.
        resize: whether to scale the shorter side and to crop the center; without it the image must have that size.

    Raises:
        DataError: the file is unreadable, of an unsupported kind, or its image has another size.
    """
    image = open_image(path)
    if resize and image.size != (size, size):
        scale = size / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.resize((width, height), Image.Resampling.LANCZOS).crop((left, top, left + size, top + size))
    if image.size != (size, size):
        raise DataError(
            f"{path}: {image.width}x{image.height} pixels, expected {size}x{size}; to scale and crop the images, train "
            "and encode take --set data.resize=true"
        )
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
