"""Sample ledger: the settings of a run and one line per sample file, beside the files."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..io.digests import digest
from ..io.files import remove_leftovers, write_text, writing
from .jobs import SampleFile

LEDGER = "samples.jsonl"
# Ledger of the files that another process than the first has written since the run began; one per process.
PART = "samples.{}.jsonl"
# Settings that change a sample by no more than the tolerance, or not at all.
FREE = ("method", "window", "certify")


def entry(file: SampleFile, sha256: str | None = None) -> dict[str, Any]:
    """Return the line of a sample file; sha256: digest of a file of many samples."""
    if file.is_image:
        return {"file": file.name, "condition": file.jobs[0].condition}
    return {"file": file.name, "sha256": sha256, "samples": [[job.index, job.copy, job.condition] for job in file.jobs]}


def begin(out: Path, files: list[SampleFile], settings: dict[str, Any], check: bool = True) -> set[str]:
    """Begin or continue a run: write the ledger of the files that exist.

    Args:
        out: folder of the run.
        files: requested files.
        settings: settings that determine the samples.
        check: compare the digests of files of many samples. A file that differs counts as missing.

    Returns:
        Names of the files that exist.

    Raises:
        ConfigError: the folder was begun with other settings or samples, or holds images without a ledger.
    """
    present = {path.name for path in out.glob("[0-9]*.*")}
    begun, entries = _read(out) if present else (settings, {})
    old, new = ({name: value for name, value in each.items() if name not in FREE} for each in (begun, settings))
    if names := sorted(name for name in old.keys() | new if old.get(name) != new.get(name)):
        raise ConfigError(f"{out} was begun with another {', '.join(names)}: give the same or choose another folder")
    for file in files:
        if (known := entries.get(file.name)) is not None:
            if not _holds(out / file.name, file, known, check):
                del entries[file.name]
        elif file.is_image and file.name in present:
            # A killed run may have left an image without its line. Its name and the settings say what it is.
            entries[file.name] = entry(file)
    # Existing files that were not requested stay in the ledger.
    existing = {name: known for name, known in entries.items() if name in present}
    remove_leftovers(out)
    write_text(out / LEDGER, _line({"settings": settings}) + "".join(_line(known) for known in existing.values()))
    # Remove the ledgers of other processes only now that their lines are in the main ledger.
    for path in out.glob(PART.format("*")):
        path.unlink(missing_ok=True)
    return set(existing)


def record(out: Path, rank: int, entries: Iterable[dict[str, Any]]) -> None:
    """Add lines of files that a process has written."""
    path = out / (PART.format(rank) if rank else LEDGER)
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write("".join(map(_line, entries)))
        file.flush()
        os.fsync(file.fileno())


def _holds(path: Path, file: SampleFile, known: dict[str, Any], check: bool) -> bool:
    """Return whether a listed file exists and holds the samples. Raises ConfigError if it holds others."""
    expected = entry(file)
    if file.is_image:
        if known["condition"] != expected["condition"]:
            raise ConfigError(f"{path} was drawn for {known['condition']!r}, not {expected['condition']!r}")
        return path.exists()
    for old, new in zip(known["samples"], expected["samples"]):
        if old != new:
            names = (f"number {copy} of condition {index}, {what!r}" for index, copy, what in (old, new))
            raise ConfigError("{} holds {}, where {} is due: choose another folder".format(path, *names))
    if len(known["samples"]) < len(expected["samples"]) or not path.exists():
        return False
    if check and digest(path) != known["sha256"]:
        warnings.warn(f"{path} is damaged: it is drawn again", stacklevel=3)
        return False
    return True


def _read(out: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Settings, and lines of all processes by file name. The last line of each ledger may be cut short."""
    path = out / LEDGER
    try:
        first, *lines = _lines(path)
        settings = first["settings"].copy()
        for path in sorted(out.glob(PART.format("*"))):
            lines += _lines(path)
        for known in lines:
            # Raises KeyError for a line that lacks a part.
            known["condition"] if known["file"].endswith(".png") else (known["sha256"], known["samples"])
        return settings, {known["file"]: known for known in lines}
    except FileNotFoundError:
        raise ConfigError(f"{out} holds images but no {LEDGER}: choose another folder") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or "not the ledger of a run"
        raise ConfigError(f"{path}: {reason}") from None


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def _line(known: dict[str, Any]) -> str:
    return json.dumps(known) + "\n"
