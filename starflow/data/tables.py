"""Images in data sets of the package datasets of Hugging Face."""

from __future__ import annotations

import dataclasses
import io
import reprlib
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from ..errors import ConfigError, DataError, ImageError
from ..io.digests import digest
from ..io.images import open_image
from .samples import MAX_CLASSES, Samples

if TYPE_CHECKING:
    from datasets import Dataset

# Files that `save_to_disk` writes into the folder of a data set, or of several splits.
SAVED = ("state.json", "dataset_dict.json")


@dataclasses.dataclass(frozen=True)
class TableImages:
    """Images of a data set by index, and its captions.

    Args:
        table: data set whose images are not decoded.
        image: column of the images.
        text: column of the captions.
        path: name of the data set for messages.
    """

    table: Dataset
    image: str
    text: str
    path: str

    def __call__(self, index: int) -> tuple[Image.Image, str]:
        """Return an image and its name."""
        value, name = self.table[index][self.image], f"{self.path}[{index}]"
        if not value or not (value["bytes"] or value["path"]):
            raise ImageError(f"{name}: no image")
        if value["bytes"]:
            return open_image(io.BytesIO(value["bytes"]), name), name
        name = f"{name} ({value['path']})"
        return open_image(Path(value["path"]), name), name

    def caption(self, index: int) -> str:
        """Return the caption of an image."""
        return str(self.table[index][self.text])


def read_table(path: str, split: str, image: str, label: str, caption: str) -> Samples:
    """Return the images of a data set.

    Args:
        path: folder that `Dataset.save_to_disk` wrote, or a name on the hub.
        split: split of a data set that has several.
        image: column of the images.
        label: column of the classes, integers or `ClassLabel`; empty for none.
        caption: column of the captions; empty for none.

    Raises:
        ConfigError: the package datasets or a column is missing.
        DataError: the data set cannot be read.
    """
    table = open_table(path, split)
    from datasets import ClassLabel
    from datasets import Image as ImageFeature

    for name, column in (("image_column", image), ("label_column", label), ("caption_column", caption)):
        if column and column not in table.column_names:
            raise ConfigError(f"{name}={column!r}: {path} has the columns {', '.join(table.column_names)}")
    if not len(table):
        raise DataError(f"{path}: no images")
    labels, classes = [0] * len(table), (Path(path).name,)
    if label:
        labels, feature = list(table[label]), table.features[label]
        for row, value in enumerate(labels):
            if not isinstance(value, int) or not 0 <= value < MAX_CLASSES:
                given = f"{label}={reprlib.repr(value)}"
                raise DataError(f"{path}[{row}]: {given} is not a class, an integer from 0 to {MAX_CLASSES - 1}")
        classes = tuple(feature.names) if isinstance(feature, ClassLabel) else tuple(map(str, range(max(labels) + 1)))
    images = TableImages(table.cast_column(image, ImageFeature(decode=False)), image, caption, path)
    return Samples(images, list(map(str, range(len(table)))), labels, classes, images.caption if caption else None)


def table_state(path: str, split: str) -> dict[str, int | str]:
    """Return the number of rows, and a digest of the columns and of the names and sizes of the files behind them.

    Args:
        path: as for `read_table`.
        split: as for `read_table`.
    """
    table = open_table(path, split)
    files = [Path(file["filename"]) for file in table.cache_files]
    lines = [str(table.features), *(f"{file.name}\0{file.stat().st_size}" for file in files)]
    return {"images": len(table), "digest": digest("\n".join(lines).encode())[:16]}


def open_table(path: str, split: str) -> Dataset:
    """Return a data set.

    Args:
        path: as for `read_table`.
        split: as for `read_table`.

    Raises:
        ConfigError: the package datasets is missing.
        DataError: the data set cannot be read.
    """
    try:
        import datasets
    except ImportError:
        need = "source 'huggingface' needs datasets: pip install 'starflow-kernels[data]'"
        raise ConfigError(f"{path}: {need}") from None
    try:
        saved = any((Path(path) / name).exists() for name in SAVED)
        table = datasets.load_from_disk(path) if saved else datasets.load_dataset(path, split=split)
        return table[split] if isinstance(table, datasets.DatasetDict) else table
    except Exception as error:
        # datasets raises many types of errors.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: not a data set that the package datasets reads ({reason})") from None
