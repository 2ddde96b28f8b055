"""Which backend of an attention was measured to be the fastest: a table, data beside the op.

benchmarks/gpu writes it. An entry holds for a chip, pass, dtype, head size and kind of window, from its number of
tokens up to that of the next entry; where there is none, the order of the backends stands.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch


class Entry(NamedTuple):
    """From `tokens` on, `backend` is the fastest; `measured`: on what, with which versions, when, and the times."""

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
    """Name of the chip in the table: "sm_90", "gfx942", "cpu"."""
    return (
        _chip_of(torch.cuda.current_device() if device.index is None else device.index)
        if device.type == "cuda"
        else device.type
    )


def chips() -> set[str]:
    """Those of this machine."""
    return {"cpu", *(_chip_of(i) for i in range(torch.cuda.device_count()))}


def merged(old: list[Entry], new: list[Entry]) -> list[Entry]:
    """All of both, in order; a new entry replaces an old one for the same arguments."""
    return [found for _, found in sorted({entry[:6]: entry for entry in (*old, *new)}.items())]


def write(path: Path, new: list[Entry]) -> None:
    """Add entries to the table of a file."""
    old = Table(path).entries if path.exists() else []
    entries = [json.dumps(entry._asdict()) for entry in merged(old, new)]
    path.write_text("[\n" + ",\n".join(entries) + "\n]\n" if entries else "[]\n")


class Table:
    """The entries of a file, read once."""

    def __init__(self, path: Path):
        self.path = path

    @functools.cached_property
    def entries(self) -> list[Entry]:
        return [Entry(**fields) for fields in json.loads(self.path.read_text())]

    @functools.cached_property
    def _index(self) -> dict[tuple, list[tuple[int, str]]]:
        """Tokens and backend of each entry, the longest first."""
        index: dict[tuple, list[tuple[int, str]]] = {}
        for entry in sorted(self.entries, key=lambda entry: -entry.tokens):
            index.setdefault(entry[:5], []).append((entry.tokens, entry.backend))
        return index

    def name(self, kind: str, q: torch.Tensor, window: bool) -> str | None:
        """The backend that was fastest in the pass `kind` for queries like q (B, T, H, d), or None."""
        if not self._index:
            return None
        key = chip(q.device), kind, str(q.dtype).removeprefix("torch."), q.shape[-1], window
        return next((backend for tokens, backend in self._index.get(key, ()) if tokens <= q.shape[1]), None)

    def here(self, kind: str) -> dict[str, str]:
        """What each backend is the fastest for on this machine."""
        found: dict[str, list[str]] = {}
        for entry in self.entries:
            if entry.kind == kind and entry.chip in chips():
                window = " in a window" if entry.window else ""
                what = f"{entry.kind} on {entry.chip} for {entry.dtype}, heads of {entry.head}{window}"
                found.setdefault(entry.backend, []).append(f"{what}, from {entry.tokens} tokens")
        return {backend: "; ".join(texts) for backend, texts in found.items()}
