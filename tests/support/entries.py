"""Entries of a run's metrics."""

from __future__ import annotations

import json
from pathlib import Path

from starflow.training.metrics import MEASURED


def entries(run: Path) -> list[dict[str, float]]:
    """Return the entries without those that a clock or the system gives."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(row["images_per_second"] > 0 for row in rows)
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]
