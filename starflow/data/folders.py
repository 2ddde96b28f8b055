"""Folders of images: the files that count, their captions, which of them are held out, and the state of a folder."""

from __future__ import annotations

import json
import os
import unicodedata
from functools import partial
from pathlib import Path

from PIL import Image

from ..errors import DataError
from ..io.digests import digest
from ..io.files import located, read_lines
from ..io.images import open_image
from .samples import Samples

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
METADATA = "metadata.jsonl"
# Names that archive programs and network drives add. Hidden names are ignored as well.
IGNORED_NAMES = {"__MACOSX", "@eaDir", "@Recycle", "#recycle", "$RECYCLE.BIN"}


def is_ignored(name: str) -> bool:
    """Return whether a file or folder of this name is no part of a data set: a hidden one, or one of IGNORED_NAMES."""
    return name.startswith(".") or name in IGNORED_NAMES


def image_files(root: Path, flat: bool) -> dict[str, list[Path]]:
    """Return the sorted image files of each class; folders without images are no classes.

    Args:
        root: folder with a folder per class.
        flat: whether the images directly in `root` form a class with the name of `root`.
    """
    entries = [path for path in sorted(root.iterdir()) if not is_ignored(path.name)]
    found = {path.name: _images_below(path) for path in entries if path.is_dir()}
    if flat:
        found.setdefault(root.name, []).extend(path for path in entries if _is_image(path.name) and not path.is_dir())
    return {name: files for name, files in found.items() if files}


def relative_name(root: Path, path: str | Path) -> str:
    """Return the path of a file relative to a folder, with slashes and in Unicode's form NFC.

    Args:
        root: folder.
        path: path relative to `root`, with slashes or backslashes, or an absolute one.
    """
    name = str(path).replace("\\", "/")
    relative = os.path.relpath(name, root) if os.path.isabs(name) else os.path.normpath(name)
    return unicodedata.normalize("NFC", relative)


def is_held_out(name: str, fraction: float, seed: int) -> bool:
    """Return whether a file is held out, which depends on no other file.

    Args:
        name: result of `relative_name`.
        fraction: expected fraction of held-out files.
        seed: seed of the choice.
    """
    return int(digest(f"{seed}/{name}".encode("utf-8", "surrogateescape"))[:13], 16) / 16**13 < fraction


def folder_state(root: Path) -> dict[str, int | str]:
    """Return the number of images below a folder, and a digest of their names and sizes with those of the metadata.

    Args:
        root: folder of images.

    Raises:
        DataError: a file is unreadable.
    """
    metadata = [path for path in [root / METADATA] if path.exists()]
    files = [path for paths in image_files(root, flat=bool(metadata)).values() for path in paths]
    return {"images": len(files), "digest": files_digest(root, files + metadata)}


def files_digest(root: Path, files: list[Path]) -> str:
    """Return a digest of the names and sizes of files.

    Args:
        root: folder to which the names are relative.
        files: files in that folder.

    Raises:
        DataError: a file is unreadable.
    """
    try:
        lines = sorted(f"{relative_name(root, path.relative_to(root))}\0{path.stat().st_size}\n" for path in files)
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from None
    return digest("".join(lines).encode("utf-8", "surrogateescape"))[:16]


def read_folder(root: Path) -> Samples:
    """Return the images of a folder.

    Args:
        root: folder with a folder per class, or with captions.

    Raises:
        DataError: there is no such folder, it has no images, or a caption is missing.
    """
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
    paths = [path for paths in by_class.values() for path in paths]
    labels = [label for label, paths in enumerate(by_class.values()) for _ in paths]
    names = [relative_name(root, path.relative_to(root)) for path in paths]
    if texts is not None and (missing := [name for name in names if name not in texts]):
        raise DataError(f"{root / METADATA}: no line for {missing[0]}")
    captions = texts and [texts[name] for name in names]
    return Samples(partial(_open, paths), names, labels, tuple(by_class), captions and captions.__getitem__)


def _open(paths: list[Path], index: int) -> tuple[Image.Image, str]:
    return open_image(paths[index]), str(paths[index])


def read_captions(root: Path) -> dict[str, str] | None:
    """Return captions by `relative_name` of a folder in Hugging Face's imagefolder layout, None without metadata.

    Args:
        root: folder of images.

    Raises:
        DataError: the metadata file is unreadable.
    """
    path = root / METADATA
    if not path.exists():
        return None
    try:
        lines = read_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}") from None
    texts = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            name, text = fields["file_name"] + "", fields["text"] + ""
        except (json.JSONDecodeError, KeyError, TypeError):
            raise DataError(f"{path}, line {number}: expected JSON with the texts file_name and text") from None
        texts[relative_name(root, name)] = text
    return texts


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in IMAGE_SUFFIXES and not is_ignored(name)


def _images_below(folder: Path) -> list[Path]:
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not is_ignored(name)]
        files += [Path(parent, name) for name in names if _is_image(name)]
    return sorted(files)
