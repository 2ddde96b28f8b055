"""The rows of a run as a Markdown page, and as a table that chooses among the attention backends."""

from __future__ import annotations

from pathlib import Path

import torch

from starflow_kernels.causal_attention import timings

from . import choice, sampling
from .runner import Rows


def _cell(value: object) -> str:
    return str(value).replace("|", "/").replace("\n", " ")


def _table(columns: str, lines: list[str]) -> list[str]:
    """Return a table with its columns, or nothing if it has no lines."""
    return ["", f"| {columns} |", "|---" * (columns.count("|") + 1) + "|", *lines] if lines else []


def markdown(rows: Rows) -> str:
    """Return all results as a page."""
    found = list(rows.results())
    kinds = {kind: [row for row in found if row.get("kind") == kind] for kind in ("constant", "check", "time")}
    head: dict = {}
    for row in found:
        head |= row.get("machine", {}) | row.get("ceilings", {})
    lines = [f"# GPU kernels on {head.get('device', 'an unknown device')}", ""]
    lines += [f"- {name}: {f'{value:.3e}' if isinstance(value, float) else value}" for name, value in head.items()]
    lines += [f"- {row['constant']}: {row['value']:g} {row['unit']}" for row in kinds["constant"]]
    others = [(row, how) for row in found for how in ("failed", "skipped") if how in row and "code" not in row]
    lines += _table("case | what happened", [f"| {row['case']} | {how}: {_cell(row[how])} |" for row, how in others])
    columns = ("op", "shape", "dtype", "check", "result", "note")
    checks = [f"| {' | '.join(_cell(row[name]) for name in columns)} |" for row in kinds["check"] if "check" in row]
    lines += _table(" | ".join(columns), checks)
    times = [_time(row) for row in kinds["time"] if "code" in row]
    lines += _table("op | shape | pass | code | us | floor, us | of the floor | peak MiB", times)
    page = "\n".join(lines) + "\n"
    if attention := attention_rows(rows):
        page += choice.markdown(attention)
    if sampled := [row for row in found if row.get("kind") == "sampling" and "code" in row]:
        page += sampling.markdown(sampled)
    return page


def _time(row: dict) -> str:
    where = f"| {row['op']} | {row['shape']} | {row['pass']} | {row['code']} "
    if "failed" in row or "skipped" in row:
        return f"{where}| {'failed' if 'failed' in row else 'skipped'} | | | |"
    memory = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
    us, floor = 1e6 * row["seconds"], 1e6 * row["floor_seconds"]
    return f"{where}| {us:.1f} | {floor:.1f} | {floor / us:.0%} | {memory} |"


def attention_rows(rows: Rows) -> list[dict]:
    """Return the times of the attention backends."""
    return [row for row in rows.results() if row.get("kind") == "attention" and "verdict" in row]


def write_table(rows: Rows, path: Path) -> None:
    """Add the fastest attention backends to the table of a file."""
    machine = next(row["machine"] for row in rows.results() if "machine" in row)
    device = torch.device("cuda" if "capability" in machine else "cpu")
    timings.write(path, choice.entries(attention_rows(rows), device, machine))
