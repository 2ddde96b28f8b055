"""Images in tar files in the layout of WebDataset: a sample is a run of members KEY.png, KEY.cls, KEY.txt.

The members are located once, so that any image can be read at any time. Order and resuming are those of a folder.
"""

from __future__ import annotations

import dataclasses
import io
import json
import posixpath
import reprlib
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ..errors import DataError
from ..io.files import located
from ..io.images import open_image
from .folders import IMAGE_SUFFIXES, files_digest, is_ignored
from .samples import MAX_CLASSES, Samples

CLASS, CAPTION, FIELDS = "cls", "txt", "json"
# Bytes that are read at once after the end of an archive.
READ_BYTES = 2**20
# Digits of the number of a class.
MAX_DIGITS = 100


class Place(NamedTuple):
    """Place of a member in a tar file: first byte and number of bytes."""

    offset: int
    size: int


@dataclasses.dataclass
class TarImages:
    """Images of tar files by index, with their captions. A call opens a file, so it may run in any process.

    Args:
        tars: tar files.
        names: name of the tar file and key of each image.
        files: index of the tar file of each image.
        images: place of each image.
        captions: place of each caption, or the caption itself.
    """

    tars: list[Path]
    names: list[str] = dataclasses.field(default_factory=list)
    files: list[int] = dataclasses.field(default_factory=list)
    images: list[Place] = dataclasses.field(default_factory=list)
    captions: list[Place | str] = dataclasses.field(default_factory=list)

    def __call__(self, index: int) -> tuple[Image.Image, str]:
        """Return an image, and its name with the path of the tar file."""
        name = self._shown(index)
        return open_image(io.BytesIO(self._bytes(index, self.images[index])), name), name

    def caption(self, index: int) -> str:
        """Return the caption of an image."""
        caption = self.captions[index]
        return caption if isinstance(caption, str) else _text(self._bytes(index, caption), self._shown(index))

    def _shown(self, index: int) -> str:
        return str(self.tars[self.files[index]].parent / self.names[index])

    def _bytes(self, index: int, place: Place) -> bytes:
        path = self.tars[self.files[index]]
        try:
            with open(path, "rb") as file:
                return _member(file, place)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None


def read_tars(root: Path) -> Samples:
    """Return the images of tar files.

    Args:
        root: a tar file, or a folder of tar files.

    Raises:
        DataError: there is no tar file, one is damaged or compressed, a sample is wrong or comes twice, or lacks
            what the others have.
    """
    images, labels = TarImages(tar_files(root)), []
    for number, path in enumerate(images.tars):
        for key, members, read in _samples(path):
            shown = f"{path}/{key}"
            found = [place for suffix, place in members.items() if f".{suffix}" in IMAGE_SUFFIXES]
            if not found:
                raise DataError(f"{shown}: a sample without an image; its members are {', '.join(members)}")
            fields = _fields(read(members[FIELDS]), shown) if FIELDS in members else {}
            label = _text(read(members[CLASS]), shown) if CLASS in members else fields.get("label")
            caption = members[CAPTION] if CAPTION in members else _caption(fields, shown)
            labels += [] if label is None else [_class(label, shown)]
            images.captions += [] if caption is None else [caption]
            images.names.append(f"{path.name}/{key}")
            images.files.append(number)
            images.images.append(found[0])
    count = len(images.names)
    for kind, given in (("class", len(labels)), ("caption", len(images.captions))):
        if given not in (0, count):
            raise DataError(f"{root}: {count} images, of which {given} have a {kind}: expected all or none")
    if not count:
        raise DataError(f"{root}: no images in the tar files")
    classes = tuple(map(str, range(max(labels) + 1))) if labels else (root.stem,)
    return Samples(images, images.names, labels or [0] * count, classes, images.caption if images.captions else None)


def tar_files(root: Path) -> list[Path]:
    """Return the tar files at a path in sorted order.

    Args:
        root: a tar file, or a folder of tar files.

    Raises:
        DataError: there are none.
    """
    files = sorted(path for path in root.glob("*.tar") if not is_ignored(path.name)) if root.is_dir() else [root]
    if not files or not root.exists():
        raise DataError(f"no tar files at {located(root)}: change it with --set data.path=FOLDER")
    return files


def tar_state(root: Path) -> dict[str, int | str]:
    """Return the number of tar files, and a digest of their names and sizes.

    Args:
        root: a tar file, or a folder of tar files.

    Raises:
        DataError: a file is unreadable.
    """
    files = tar_files(root)
    return {"tars": len(files), "digest": files_digest(files[0].parent, files)}


def _samples(path: Path) -> Iterator[tuple[str, dict[str, Place], partial[bytes]]]:
    """Yield key, members by suffix, and a reader of members, for each sample of a tar file."""
    key, members, keys = "", {}, set()
    try:
        with open(path, "rb") as file, tarfile.open(path, "r:") as tar:
            read = partial(_member, file)
            for info in _infos(path, tar):
                folder, base = posixpath.split(info.name)
                # Names such as __key__ describe the whole file.
                if not info.isfile() or is_ignored(base) or base.startswith("__"):
                    continue
                stem, _, suffix = base.partition(".")
                if (own := posixpath.join(folder, stem)) != key:
                    if members:
                        yield key, members, read
                    if own in keys:
                        raise DataError(f"{path}/{own}: two samples of this key (members of one must be adjacent)")
                    keys.add(own)
                    key, members = own, {}
                if (suffix := suffix.lower()) in members:
                    raise DataError(f"{path}/{own}.{suffix}: two members of this name")
                members[suffix] = Place(info.offset_data, info.size)
            _check_end(path, file, tar.offset)
            if members:
                yield key, members, read
    except tarfile.TarError as error:
        raise DataError(f"{path}: not an uncompressed tar file ({error})") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def _infos(path: Path, tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar file; DataError names the first byte that is not understood."""
    try:
        yield from tar
    except tarfile.TarError as error:
        end = min(tar.offset, path.stat().st_size)
        raise DataError(f"{path}: damaged or cut at byte {end} ({error})") from None


def _check_end(path: Path, file: io.BufferedReader, end: int) -> None:
    """Check that zeros alone follow the last member: tarfile takes a damaged header for the end of the file.

    Args:
        path: tar file for messages.
        file: the tar file.
        end: first byte after the last member.
    """
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise DataError(f"{path}: damaged or cut at byte {end}: neither a member nor the end of the archive")
    while block := file.read(READ_BYTES):
        if block.count(0) != len(block):
            raise DataError(f"{path}: the archive ends at byte {end}, but data follow: damaged, or joined files")


def _member(file: io.BufferedReader, place: Place) -> bytes:
    file.seek(place.offset)
    return file.read(place.size)


def _text(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: {error}") from None


def _fields(data: bytes, name: str) -> dict:
    try:
        fields = json.loads(data)
    except ValueError as error:
        raise DataError(f"{name}.{FIELDS}: {error}") from None
    return fields if isinstance(fields, dict) else {}


def _caption(fields: dict, name: str) -> str | None:
    """Return the caption among the fields of a sample; None without one."""
    caption = fields.get("caption")
    if not isinstance(caption, str | None):
        raise DataError(f"{name}.{FIELDS}: the caption is a {type(caption).__name__}, expected a text")
    # JSON can spell half of a surrogate pair, which no encoding of text holds.
    if caption and not caption.isascii() and any("\ud800" <= c <= "\udfff" for c in caption):
        raise DataError(f"{name}.{FIELDS}: the caption has half of a surrogate pair, expected a text")
    return caption


def _class(label: object, name: str) -> int:
    """Return the number of a class."""
    digits = str(label)
    # Python converts no more than some thousands of digits.
    if not digits.isdecimal() or len(digits) > MAX_DIGITS or int(digits) >= MAX_CLASSES:
        raise DataError(f"{name}: class {reprlib.repr(label)} is not an integer from 0 to {MAX_CLASSES - 1}")
    return int(digits)
