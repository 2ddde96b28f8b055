"""Which solver each block of a flow is inverted with: what a caller asks for, and what was measured before."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

import torch

from starflow_kernels import Solver, SolveReport
from starflow_kernels.spec import Quantize

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..models.flow import Flow, Guidance

METHODS = ("sequential", "jacobi")
TOLERANCE = Solver().tol
# Batch sizes and guidance weights this far apart still share a measurement.
NEAR = 2.0
# In windows of up to so many rows the token a row before adds nothing to the previous one, but time.
WINDOW_ROWS = 4


@dataclasses.dataclass(frozen=True)
class Conditions:
    """What a measurement was made under.

    device: type of the device. threads: of the CPU, 0 on other devices. dtype: of the weights. batch_size: images.
    tol: tolerance of the solvers. guidance, rule, annealed: as in Guidance, weight 0 for none.
    """

    device: str
    threads: int
    dtype: str
    batch_size: int
    tol: float = TOLERANCE
    guidance: float = 0.0
    rule: str = "tarflow"
    annealed: bool = False

    @classmethod
    def of(
        cls, flow: Flow, batch_size: int, guidance: Guidance, tol: float = TOLERANCE, device: torch.device | None = None
    ) -> Conditions:
        """Those of a call that is due; device: where it runs, that of the weights by default."""
        device, dtype = (device or flow.device).type, str(next(flow.parameters()).dtype).removeprefix("torch.")
        how = (guidance.weight, guidance.rule, guidance.annealed) if guidance.weight else ()
        return cls(device, torch.get_num_threads() if device == "cpu" else 0, dtype, batch_size, tol, *how)

    def guides_like(self, other: Conditions) -> bool:
        """Whether guidance is the same, or nearly."""
        if not self.guidance or not other.guidance:
            return self.guidance == other.guidance
        same = (self.rule, self.annealed) == (other.rule, other.annealed)
        return same and _distance(self.guidance, other.guidance) <= math.log(NEAR)

    def cover(self, call: Conditions) -> bool:
        """Whether what was fastest under these is so in a call: same machine, at least its tolerance, similar size."""
        same = (self.device, self.threads, self.dtype) == (call.device, call.threads, call.dtype)
        similar = _distance(self.batch_size, call.batch_size) <= math.log(NEAR) and self.guides_like(call)
        return same and similar and self.tol <= call.tol


@dataclasses.dataclass(frozen=True)
class Trial:
    """A solver that was tried on a block: median seconds of a batch, its most passes, its tokens evaluated, and the
    largest difference from the sequential result. All None where it was given up for taking too long."""

    method: str
    window: int = 0
    neighbours: tuple[int, ...] = ()
    seconds: float | None = None
    passes: int | None = None
    tokens: int | None = None
    error: float | None = None

    def __str__(self):
        return describe(self.method, self.window, self.neighbours)


@dataclasses.dataclass(frozen=True)
class BlockMeasurement:
    """Trials of a block, first the sequential one, and the index of the one to use."""

    trials: tuple[Trial, ...]
    chosen: int

    @property
    def choice(self) -> Trial:
        """The trial to use."""
        return self.trials[self.chosen]

    def solver(self, tol: float) -> Solver:
        """The solver to use."""
        return Solver(self.choice.method, self.choice.window, tol=tol, neighbours=self.choice.neighbours)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What was fastest for each block, in the order of the blocks; machine: name of the device, for the reader."""

    conditions: Conditions
    machine: str
    blocks: tuple[BlockMeasurement, ...]

    @property
    def seconds(self) -> float:
        """Of a batch, with the solvers to use."""
        return sum(block.choice.seconds for block in self.blocks)

    @property
    def sequential_seconds(self) -> float:
        """Of a batch, one token after the other."""
        return sum(block.trials[0].seconds for block in self.blocks)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Measurements of one flow, whose images have a `grid` of (rows, columns) tokens of `token_dim` values."""

    grid: tuple[int, int]
    token_dim: int
    measurements: tuple[Measurement, ...] = ()

    def add(self, measurement: Measurement) -> Calibration:
        """With one more, in place of an earlier one under the same conditions."""
        others = [other for other in self.measurements if other.conditions != measurement.conditions]
        return dataclasses.replace(self, measurements=(*others, measurement))

    def find(self, call: Conditions) -> Measurement | None:
        """The one of the nearest batch size that covers a call, if there is one."""
        found = [m for m in self.measurements if m.conditions.cover(call)]
        return min(found, key=lambda m: _distance(m.conditions.batch_size, call.batch_size), default=None)


@dataclasses.dataclass(frozen=True)
class Inversion:
    """How a flow is asked to be inverted.

    method: "sequential", one token after the other; "jacobi", quasi-Newton sweeps over many at once until they stand
        still; "auto", what a calibration found fastest for each block on this kind of device with these threads and
        about this batch size, and sequential where none covers the call.
    window: tokens that iterate together, of "jacobi"; None for all. tol: as in Solver, None for its default.
    quantize: weights of one byte, "int8" or "fp8", which changes the images; see `starflow_kernels.block_inverse`.

    Raises ConfigError for a value out of range.
    """

    method: str = "auto"
    window: int | None = None
    tol: float | None = None
    quantize: Quantize = "none"

    def __post_init__(self):
        if self.quantize not in get_args(Quantize):
            raise ConfigError(f"quantize={self.quantize!r}: expected one of {', '.join(get_args(Quantize))}")
        if self.method not in ("auto", *METHODS):
            raise ConfigError(f"method={self.method!r}: expected auto or one of {', '.join(METHODS)}")
        if self.window is not None and self.method != "jacobi":
            raise ConfigError(f"window={self.window}: for method='jacobi', not {self.method!r}")
        try:
            Solver("jacobi", self.window or 0, tol=self.tolerance)
        except (TypeError, ValueError) as error:
            raise ConfigError(str(error)) from None

    @property
    def tolerance(self) -> float:
        """The tolerance, named or not."""
        return TOLERANCE if self.tol is None else self.tol

    def solvers(self, flow: Flow, z: torch.Tensor, guidance: Guidance) -> list[Solver]:
        """The solver of each block for noise z (B, C, H, W)."""
        count, grid, found = len(flow.blocks), flow.grid(z), None
        if self.method == "jacobi":
            window = self.window or 0
            return [Solver("jacobi", window, tol=self.tolerance, neighbours=neighbours(grid, window))] * count
        tempered = guidance.weight and guidance.temperature != 1
        if self.method == "auto" and flow.calibration and grid == flow.calibration.grid and not tempered:
            # Weights may come to the device of z only when they are needed.
            found = flow.calibration.find(Conditions.of(flow, len(z), guidance, self.tolerance, z.device))
        return [block.solver(self.tolerance) for block in found.blocks] if found else [Solver()] * count


@dataclasses.dataclass(frozen=True)
class BlockReport:
    """How a block was inverted, over all batches.

    method, window, neighbours: as in Solver, of the first batch. length: tokens of a sample. samples: of all batches.
    passes: calls of the network one after the other, of the batch that took most. tokens: that it evaluated. seconds:
    wall time. residual, fallbacks: as in `starflow_kernels.SolveReport`, the largest and the sum.
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
        """That of one call."""
        samples, length = report.sweeps.shape
        how, counts = (solver.method, solver.window, solver.neighbours), (report.passes, report.tokens, report.seconds)
        return cls(*how, length, samples, *counts, report.residual, report.fallbacks)

    def __add__(self, other: BlockReport) -> BlockReport:
        sums = {name: getattr(self, name) + getattr(other, name) for name in SUMS}
        largest = {name: max(getattr(self, name), getattr(other, name)) for name in ("passes", "residual")}
        return dataclasses.replace(self, **sums, **largest)

    def __str__(self):
        each = self.tokens / max(1, self.samples * self.length)
        fell = f", {self.fallbacks} samples fell back to single tokens" if self.fallbacks else ""
        return (
            f"{describe(self.method, self.window, self.neighbours)}: {self.passes} passes for {self.length} tokens, "
            f"each evaluated {each:.1f} times, {self.seconds:.3f} s{fell}"
        )


SUMS = ("samples", "tokens", "seconds", "fallbacks")


def block_reports(solvers: Sequence[Solver], reports: Sequence[SolveReport]) -> list[BlockReport]:
    """Of each block of one call of `Flow.inverse`."""
    return [BlockReport.of(*pair) for pair in zip(solvers, reports)]


def add_reports(first: list[BlockReport], more: list[BlockReport]) -> list[BlockReport]:
    """Of each block over two calls; `first` may be empty."""
    return [one + other for one, other in zip(first, more)] if first else more


def method_of(blocks: Sequence[BlockReport]) -> str:
    """The method that was used, "sequential" where no block used another."""
    return next((block.method for block in blocks if block.method != METHODS[0]), METHODS[0])


def describe(method: str, window: int, neighbours: tuple[int, ...]) -> str:
    """A solver in words."""
    if method == METHODS[0]:
        return method
    return f"{method}, {f'window {window}' if window else 'all tokens'}{', neighbours' if neighbours else ''}"


def neighbours(grid: tuple[int, int], window: int) -> tuple[int, ...]:
    """Distances to the tokens that one depends on most: the previous one, and the one a row before where a window (0:
    all tokens) has more than a few rows."""
    columns = grid[1]
    return (1, columns) if columns > 1 and not 0 < window <= WINDOW_ROWS * columns else (1,)


def _distance(one: float, other: float) -> float:
    return abs(math.log(one / other))
