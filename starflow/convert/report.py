"""Report of a conversion."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from ..io.files import write_text

REPORT = "conversion.json"


@dataclasses.dataclass(frozen=True)
class Report:
    """Result of a conversion, as stored in conversion.json.

    Args:
        source: name of the file or folder that was read.
        family: "tarflow" or "starflow".
        config: settings of the flow.
        arguments: upstream settings, from the name of the file or a YAML. Only this field keeps the settings of the
            autoencoder and the text encoder.
        parameters: number of parameters.
        kept: name in this package by upstream name.
        dropped: reason by upstream name.
        checked: checks that passed, in words.
        dtype: dtypes of the written weights.
        source_bytes: size of the source in bytes.
        bytes: size of the written weights in bytes.
        files: names of the written files, this report excluded.
        seconds: duration.
    """

    source: str
    family: str
    config: dict[str, Any]
    arguments: dict[str, Any]
    parameters: int
    kept: dict[str, str]
    dropped: dict[str, str]
    checked: list[str]
    dtype: str
    source_bytes: int
    bytes: int
    files: list[str]
    seconds: float

    def write(self, folder: Path) -> None:
        """Write conversion.json.

        Args:
            folder: folder to write to.
        """
        write_text(folder / REPORT, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        return [
            f"{self.family}: {self.parameters:,} parameters, {self.dtype}, {_size(self.source_bytes)} read, "
            f"{_size(self.bytes)} written in {self.seconds:.1f} s",
            f"kept: {len(self.kept)} weights",
            *(f"dropped: {len(n)}, {reason}: {shortened(n)}" for reason, n in self.dropped_by_reason().items()),
            *(f"checked: {check}" for check in self.checked),
        ]

    def dropped_by_reason(self) -> dict[str, list[str]]:
        """Return the upstream names of the dropped tensors by reason."""
        names: dict[str, list[str]] = {}
        for name, reason in self.dropped.items():
            names.setdefault(reason, []).append(name)
        return names


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def shortened(names: list[str]) -> str:
    """Return the first few distinct names as text, with `*` in place of numbers.

    Args:
        names: names of tensors.
    """
    names = list(dict.fromkeys(re.sub(r"\.[0-9]+\.", ".*.", name) for name in names))
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def is_replaceable(folder: Path) -> bool:
    """Return whether a folder holds the files of a conversion and no others.

    Args:
        folder: folder to look at.
    """
    try:
        files = json.loads((folder / REPORT).read_bytes())["files"]
        return {path.name for path in folder.iterdir()} <= {*files, REPORT}
    except (OSError, ValueError, KeyError, TypeError):
        return False
