"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from ..errors import StarflowError

TOKEN_BYTES = 4


def temporary_name(name: str, token: str | None = None) -> str:
    """Return the hidden name of a file or folder while it is written.

    Args:
        name: its name once it is whole.
        token: 8 hexadecimal digits, drawn by default; processes that write a folder together give the same ones.
    """
    return f".{name}.{token or secrets.token_hex(TOKEN_BYTES)}.part"


def located(path: Path) -> str:
    """Return a path for an error message; a relative one with the folder that it starts from."""
    return str(path) if path.is_absolute() else f"{path} (relative to {Path.cwd()})"


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file in UTF-8, with or without a byte order mark.

    A line ends with LF, CR LF or CR. Other separators, such as U+2028 or U+0085, belong to the text.

    Args:
        path: text file.

    Raises:
        OSError: the file is unreadable.
        UnicodeDecodeError: the file is not in UTF-8.
    """
    return path.read_text(encoding="utf-8-sig").split("\n")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Report that the file system refuses to write, for instance without space or permission, as a StarflowError.

    Args:
        path: what is written in the context, by code that raises no other RuntimeError: torch.save reports a full disk
            by one.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise _refused(path, error) from None


def _refused(path: Path, error: Exception) -> StarflowError:
    """Return the error that a path cannot be written."""
    if isinstance(error, shutil.Error):
        # It lists the source, the target and the reason of each file.
        return StarflowError(f"cannot write {path}: {error.args[0][0][-1]}")
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    return StarflowError(f"cannot write {path}: {reason}")


def check_writable(folder: Path) -> None:
    """Check that files can be written into a folder, which need not exist; nothing is left behind.

    Args:
        folder: the folder.

    Raises:
        StarflowError: the file system refuses.
    """
    place = folder.absolute()
    with writing(folder):
        while True:
            with contextlib.suppress(FileNotFoundError):
                os.lstat(place)
                break
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            pass


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Write a temporary file beside `path`, then move it there.

    A symbolic link is kept, and its target is written. A FIFO, a device or a socket is kept and gets the bytes.

    Args:
        path: file to write.
        write: called with the path of the temporary file; writes it.

    Raises:
        StarflowError: the file system refuses, for instance without space or permission. `path` is then unchanged.
    """
    path = Path(path)
    with writing(path):
        is_stream = path.exists() and not path.is_file()
        target = path if is_stream else path.resolve()
        if not is_stream:
            target.parent.mkdir(parents=True, exist_ok=True)
        temporary, mode = _new_file(Path(tempfile.gettempdir()) if is_stream else target.parent, target.name)
        try:
            write(temporary)
            if is_stream:
                with open(temporary, "rb") as file, open(path, "wb") as stream:
                    shutil.copyfileobj(file, stream)
                return
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            # safetensors replaces the file by one that only its owner reads.
            temporary.chmod(mode)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the unfinished files and folders that a process has left in a folder when it was killed.

    Args:
        folder: folder in which no other process writes, or one that does not exist.
    """
    for path in Path(folder).glob(temporary_name("*", "[0-9a-f]" * 2 * TOKEN_BYTES)):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def permit_reading(folder: str | Path) -> None:
    """Give the weight files in a folder the permissions of new files: safetensors lets only their owner read them."""
    probe, mode = _new_file(Path(folder), "mode")
    probe.unlink()
    for path in Path(folder).rglob("*.safetensors"):
        path.chmod(mode)


def _new_file(folder: Path, name: str) -> tuple[Path, int]:
    """Make a temporary file; return its path and its mode, which the umask gives."""
    path = folder / temporary_name(name)
    path.touch(exist_ok=False)
    return path, path.stat().st_mode


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@contextlib.contextmanager
def write_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside `path` that becomes `path` when the context ends without an error.

    A symbolic link to a folder is kept, and that folder is replaced.

    Args:
        path: folder to write.
        overwrite: replace an existing folder.

    Raises:
        StarflowError: `path` exists, or the file system refuses. The temporary folder is then removed.
    """
    if os.path.lexists(path) and not overwrite:
        raise StarflowError(f"{Path(path).absolute()} exists already")
    path = Path(path).resolve()
    new_parents = [parent for parent in path.parents if not parent.exists()]
    temporary = path.with_name(temporary_name(path.name))
    try:
        (temporary / "new").mkdir(parents=True)
        yield temporary / "new"
        if path.exists():
            os.rename(path, temporary / "old")
        try:
            os.rename(temporary / "new", path)
        except OSError:
            if (temporary / "old").exists():
                os.rename(temporary / "old", path)
            raise
    except (OSError, SafetensorError, StarflowError) as error:
        known = error if isinstance(error, StarflowError) else _refused(path, error)
        # The user does not know the name of the temporary folder.
        raise type(known)(str(known).replace(str(temporary / "new"), str(path))) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in new_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()
