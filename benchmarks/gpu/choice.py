"""Times of every attention backend on a GPU, and the entries of the table that chooses one by them."""

from __future__ import annotations

import contextlib
import datetime
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

import starflow_kernels
from starflow_kernels.causal_attention.timings import Entry, chip

from .op_cases import angles, randn

TABLE = Path(starflow_kernels.__file__).parent / "causal_attention" / "timings.json"
# B, T, H, H_kv, d, window
SHAPES = [
    (tokens // T, T, width // d, width // d, d, window)
    for tokens, width in ((16384, 1024),)
    for d in (64, 128)
    for T, window in ((256, None), (1024, None), (4096, None), (1024, 256), (4096, 256))
]
DRY = [(2, 70, 2, 1, 16, None)]


class Passes(NamedTuple):
    """Both passes of a backend: forward() returns out and log-sum-exp, backward() the gradients of q, k and v."""

    forward: Callable
    backward: Callable


def draw(shape, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    """Return random q, k, v and gradient of the output for a shape (B, T, H, H_kv, d, window)."""
    B, T, H, groups, d, _ = shape
    tensors = randn(dtype, device, (B, T, H, d), (B, T, groups, d), (B, T, groups, d), (B, T, H, d))
    return dict(zip(("q", "k", "v", "grad"), tensors))


def arguments(tensors: dict[str, torch.Tensor], window: int | None) -> tuple:
    """Return the arguments of the op, with rotary positions."""
    q, k, v, _ = tensors.values()
    cos, sin = angles(q.shape[1], q.shape[3], q.dtype, q.device)[q.dtype]
    return q, k, v, cos, sin, "interleaved", window or 0, 1.0


def passes(tensors: dict[str, torch.Tensor], window: int | None, backend: str) -> Passes:
    """Return both passes of a backend; the forward pass runs once, as the backward pass reads its outputs."""
    args, grad = arguments(tensors, window), tensors["grad"]
    op = torch.ops.starflow

    def forward():
        return op.causal_attention(*args, backend=backend)

    outputs = list(forward())
    return Passes(forward, lambda: op.causal_attention_backward([grad, None], outputs, *args, backend=backend))


def verdicts(tensors: dict[str, torch.Tensor], window: int | None, backend: str) -> dict[str, str]:
    """Return for each pass why its results do not count, or "".

    The results must keep the error contract, repeat their bits, and give a row the same bits alone.
    """
    wide = {name: t.to(torch.float32 if t.dtype != torch.float32 else torch.float64) for name, t in tensors.items()}
    exact, plain = passes(wide, window, "reference"), passes(tensors, window, "reference")
    first, again = (passes(tensors, window, backend) for _ in range(2))
    alone = passes({name: t[-1:] for name, t in tensors.items()}, window, backend)
    verdict = {}
    for kind in Passes._fields:
        values = [list(getattr(p, kind)()) for p in (first, plain, exact, again, alone)]
        verdict[kind] = ""
        for value, usual, right, repeated, row in zip(*values, strict=True):
            if not torch.isfinite(value).all():
                verdict[kind] = "not finite"
                break
            error, allowed = ((t.double() - right.double()).abs().max().item() for t in (value, usual))
            bound = 2 * (allowed + torch.finfo(value.dtype).eps * right.abs().max().item())
            if error > bound:
                verdict[kind] = f"{error / bound:.2f} of the error that the contract allows"
                break
            if not torch.equal(value, repeated):
                verdict[kind] = "not deterministic"
                break
            if not torch.equal(value[-1:], row):
                verdict[kind] = "a row depends on the batch"
                break
    return verdict


def candidates(tensors: dict[str, torch.Tensor], window: int | None) -> list[str]:
    """Return the backends that take these arguments on this machine, without the reference."""
    names = []
    for name in (name for name in starflow_kernels.backends()["causal_attention"] if name != "reference"):
        try:
            passes(tensors, window, name)
        except Exception as error:
            # `measure` records any other error.
            if "cannot run" in str(error):
                continue
        names.append(name)
    return names


def measure(shape: tuple, dtype: torch.dtype, device: str, seconds: Callable) -> Iterator[dict]:
    """Yield a row per backend and pass: its seconds, and why its results do not count, or ""."""
    tensors, window = draw(shape, dtype, device), shape[-1]
    for backend in candidates(tensors, window):
        row = {"shape": shape, "dtype": str(dtype)[6:], "backend": backend}
        try:
            verdict, both = verdicts(tensors, window, backend), passes(tensors, window, backend)
            times = {
                kind: {"verdict": verdict[kind], "seconds": seconds(getattr(both, kind))} for kind in Passes._fields
            }
        except Exception as error:
            traceback.print_exc()
            times = {kind: {"verdict": f"{type(error).__name__}: {error}"[:300]} for kind in Passes._fields}
        yield from ({**row, "pass": kind, **fields} for kind, fields in times.items())


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Make torch's own kernels deterministic, which its fused backward pass needs; new memory is not filled."""
    settings = torch.utils.deterministic
    enabled, fill = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled)
        settings.fill_uninitialized_memory = fill


def entries(rows: list[dict], device: torch.device, machine: dict) -> list[Entry]:
    """Return an entry per shape, dtype and pass: the fastest backend among those whose results count."""
    table, groups = [], {}
    for row in rows:
        groups.setdefault((tuple(row["shape"]), row["dtype"], row["pass"]), []).append(row)
    for (shape, dtype, kind), group in groups.items():
        right = [row for row in group if not row["verdict"]]
        if not right:
            continue
        best = min(right, key=lambda row: row["seconds"])
        times = ", ".join(f"{row['backend']} {1e6 * row['seconds']:.0f} us" for row in right)
        versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "triton") if name in machine)
        where = f"{machine['device']}, {versions}, {datetime.date.today()}, {shape[:5]}: {times}"
        _, T, _, _, d, window = shape
        table.append(Entry(chip(device), kind, dtype, d, 0 < (window or 0) < T, T, best["backend"], where))
    return table


def markdown(rows: list[dict]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["", "| attention (B, T, H, H_kv, d, window) | dtype | pass | backend | us | does not count because |"]
    lines.append("|---|---|---|---|---|---|")
    for r in rows:
        us = f"{1e6 * r['seconds']:.1f}" if "seconds" in r else ""
        why = r["verdict"].replace("|", "/").replace("\n", " ")
        lines.append(f"| {r['shape']} | {r['dtype']} | {r['pass']} | {r['backend']} | {us} | {why} |")
    return "\n".join(lines) + "\n"
