"""Report of the solve of a block."""

from __future__ import annotations

import torch

from ..solver import SolveReport
from .layout import Layout


def solve_report(
    layout: Layout, known: torch.Tensor | None, seconds: float, B: int, *counters: torch.Tensor
) -> SolveReport:
    """Return the report of a sequential solve without counters, of Jacobi with sweeps, counts and residual."""
    first = 0 if layout.spec.start else 1
    if counters:
        sweeps, counts, residuals = counters
        passes, fallbacks, _ = counts.cpu().unbind(1)
        sweeps = torch.nn.functional.pad(sweeps, (0, layout.tokens - layout.slots))
        most = int(passes.max()) if B else 0
        residual = float(residuals.max()) if B else 0.0
        return SolveReport("jacobi", most, int(sweeps.sum()), seconds, sweeps, residual, int((fallbacks > 0).sum()))
    slot = torch.arange(layout.tokens, dtype=torch.int64, device="cpu")
    solved = ((slot >= first) & (slot < layout.slots)).expand(B, -1)
    if layout.inside is not None:
        solved = solved & layout.inside.cpu()
    if known is not None:
        solved = solved & (slot >= known.cpu()[:, None])
    steps = int(solved.any(0).sum())
    return SolveReport("sequential", steps, int(solved.sum()), seconds, solved.int())
