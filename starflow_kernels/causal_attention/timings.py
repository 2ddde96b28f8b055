"""Table of the attention backends that were measured fastest, stored beside the op and written by benchmarks/gpu.

An entry applies to one chip, pass, dtype and head size, with or without a window, from its number of tokens up to the
number of the next entry. Without an entry, the usual order of the backends applies.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch


class Entry(NamedTuple):
    """Row of the table: from `tokens` on, `backend` is the fastest.

    kind: "forward" or "backward". head: values per head. window: whether attention is windowed. measured: device,
    versions, date and times of the measurement.
    """

    chip: str
    kind: str
    dtype: str
    head: int
    window: bool
    tokens: int
    backend: str
    measured: str


@functools.cache
def _chip_of(index: int) -> str:
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(index).gcnArchName.partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(index))


def chip(device: torch.device) -> str:
    """Return the name of a chip in the table, such as "sm_90", "gfx942" or "cpu"."""
    return (
        _chip_of(torch.cuda.current_device() if device.index is None else device.index)
        if device.type == "cuda"
        else device.type
    )


def chips() -> set[str]:
    """Return the names of the chips of this machine."""
    return {"cpu", *(_chip_of(i) for i in range(torch.cuda.device_count()))}


def merged(old: list[Entry], new: list[Entry]) -> list[Entry]:
    """Merge two tables, sorted; a new entry replaces an old one for the same arguments."""
    return [entry for _, entry in sorted({entry[:6]: entry for entry in (*old, *new)}.items())]


def write(path: Path, new: list[Entry]) -> None:
    """Merge entries into the table of a file."""
    old = Table(path).entries if path.exists() else []
    entries = [json.dumps(entry._asdict()) for entry in merged(old, new)]
    path.write_text("[\n" + ",\n".join(entries) + "\n]\n" if entries else "[]\n", encoding="utf-8")


class Table:
    """Table in a file, which is read once."""

    def __init__(self, path: Path):
        self.path = path

    @functools.cached_property
    def entries(self) -> list[Entry]:
        """All entries."""
        return [Entry(**fields) for fields in json.loads(self.path.read_bytes())]

    @functools.cached_property
    def _index(self) -> dict[tuple, list[tuple[int, str]]]:
        """Map (chip, kind, dtype, head, window) to a list of (tokens, backend), most tokens first."""
        index: dict[tuple, list[tuple[int, str]]] = {}
        for entry in sorted(self.entries, key=lambda entry: -entry.tokens):
            index.setdefault(entry[:5], []).append((entry.tokens, entry.backend))
        return index

    def name(self, kind: str, q: torch.Tensor, window: bool) -> str | None:
        """Return the backend that was measured fastest in pass `kind` for queries like q (B, T, H, d), or None."""
        if not self._index:
            return None
        key = chip(q.device), kind, str(q.dtype).removeprefix("torch."), q.shape[-1], window
        return next((backend for tokens, backend in self._index.get(key, ()) if tokens <= q.shape[1]), None)

    def here(self, kind: str) -> dict[str, str]:
        """Map each backend to the arguments for which it is fastest on this machine."""
        cases: dict[str, list[str]] = {}
        for entry in self.entries:
            if entry.kind == kind and entry.chip in chips():
                window = " in a window" if entry.window else ""
                what = f"{entry.kind} on {entry.chip} for {entry.dtype}, heads of {entry.head}{window}"
                cases.setdefault(entry.backend, []).append(f"{what}, from {entry.tokens} tokens")
        return {backend: "; ".join(texts) for backend, texts in cases.items()}
