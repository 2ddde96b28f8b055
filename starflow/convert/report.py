"""What a conversion did."""

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
    """kept: released name -> ours. dropped: released name -> reason. checked: what was verified, in words.

    arguments: the released settings, from the file's name or a YAML; those of the autoencoder and the text encoder are
    here and nowhere else. files: what was written, this report aside.
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
        """Write conversion.json into a folder."""
        write_text(folder / REPORT, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    def lines(self) -> list[str]:
        """The report for people."""
        dropped: dict[str, list[str]] = {}
        for name, reason in self.dropped.items():
            dropped.setdefault(reason, []).append(re.sub(r"\.[0-9]+\.", ".*.", name))
        return [
            f"{self.family}: {self.parameters:,} parameters, {self.dtype}, {_size(self.source_bytes)} read, "
            f"{_size(self.bytes)} written in {self.seconds:.1f} s",
            f"kept: {len(self.kept)} weights",
            *(f"dropped: {len(names)}, {reason}: {_some(names)}" for reason, names in dropped.items()),
            *(f"checked: {check}" for check in self.checked),
        ]


def _size(count: int) -> str:
    """Bytes in words."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _some(names: list[str]) -> str:
    """The first distinct names."""
    names = list(dict.fromkeys(names))
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def replaceable(folder: Path) -> bool:
    """Whether a folder holds what a conversion wrote and nothing else."""
    try:
        files = json.loads((folder / REPORT).read_text())["files"]
        return {path.name for path in folder.iterdir()} <= {*files, REPORT}
    except (OSError, ValueError, KeyError, TypeError):
        return False
