"""Reports of how the blocks of a flow were inverted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from starflow_kernels.solver import Solver, SolveReport

from ..models.calibration import SEQUENTIAL, describe

SUMMED = ("samples", "tokens", "seconds", "fallbacks")
LARGEST = ("passes", "residual")


@dataclasses.dataclass(frozen=True)
class BlockReport:
    """How a block was inverted, over all batches.

    Args:
        method: method of the solver.
        window: window of the solver in tokens, 0 for all.
        neighbours: distances of the solver's quasi-Newton steps in tokens.
        length: tokens per sample.
        samples: samples of all batches.
        passes: network passes, one after the other, of the batch that needed the most.
        tokens: tokens evaluated, over all batches.
        seconds: wall time of all batches.
        residual: largest residual, see `starflow_kernels.SolveReport`.
        fallbacks: samples that fell back to one token per pass.
    """

    method: str
    window: int
    neighbours: tuple[int, ...]
    length: int
    samples: int
    passes: int
    tokens: int
    seconds: float
    residual: float
    fallbacks: int

    @classmethod
    def of(cls, solver: Solver, report: SolveReport) -> BlockReport:
        """Report of one call."""
        samples, length = report.sweeps.shape
        how, counts = (solver.method, solver.window, solver.neighbours), (report.passes, report.tokens, report.seconds)
        return cls(*how, length, samples, *counts, report.residual, report.fallbacks)

    def __add__(self, other: BlockReport) -> BlockReport:
        sums = {name: getattr(self, name) + getattr(other, name) for name in SUMMED}
        largest = {name: max(getattr(self, name), getattr(other, name)) for name in LARGEST}
        return dataclasses.replace(self, **sums, **largest)

    def __str__(self):
        times = self.tokens / max(1, self.samples * self.length)
        fell = f", {self.fallbacks} samples fell back to single tokens" if self.fallbacks else ""
        return (
            f"{describe(self.method, self.window, self.neighbours)}: {self.passes} passes for {self.length} tokens, "
            f"each evaluated {times:.1f} times, {self.seconds:.3f} s{fell}"
        )


def block_reports(solvers: Sequence[Solver], reports: Sequence[SolveReport]) -> list[BlockReport]:
    """Report of each block in one call of `Flow.inverse`."""
    return [BlockReport.of(*pair) for pair in zip(solvers, reports)]


def add_reports(first: list[BlockReport], more: list[BlockReport]) -> list[BlockReport]:
    """Report of each block over two sets of batches; either may be empty."""
    return [one + other for one, other in zip(first, more)] if first and more else first or more


def method_of(blocks: Sequence[BlockReport]) -> str:
    """Method that was used; "sequential" if no block used another one."""
    return next((block.method for block in blocks if block.method != SEQUENTIAL), SEQUENTIAL)
