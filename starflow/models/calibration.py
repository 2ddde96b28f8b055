"""Measured speed of the solvers of a flow's blocks, and its file solvers.json beside the weights."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from starflow_kernels.solver import Method, Solver

from ..errors import CheckpointError, StarflowError
from ..io.files import write_text
from .config import FlowConfig
from .guidance import Guidance

SOLVERS = "solvers.json"
VERSION = 1
SEQUENTIAL = "sequential"
# Batch sizes and guidance weights within this factor share a measurement.
NEAR = 2.0


@dataclasses.dataclass(frozen=True)
class Conditions:
    """Conditions of a measurement.

    Args:
        device: type of the device.
        threads: CPU threads, 0 on other devices.
        dtype: dtype of the weights.
        batch_size: images per batch.
        tol: tolerance of the solvers.
        guidance: guidance weight, 0 for none.
        rule: guidance rule.
        annealed: whether the guidance weight grows over the tokens.
    """

    device: str
    threads: int
    dtype: str
    batch_size: int
    tol: float = Solver.tol
    guidance: float = 0.0
    rule: str = "tarflow"
    annealed: bool = False

    @classmethod
    def of(
        cls,
        model: nn.Module,
        batch_size: int,
        guidance: Guidance,
        tol: float = Solver.tol,
        device: torch.device | None = None,
    ) -> Conditions:
        """Conditions of a call.

        Args:
            model: the flow.
            batch_size: images per batch.
            guidance: guidance of the call.
            tol: tolerance of the solvers.
            device: device of the call, by default the one of the weights.
        """
        weight = next(model.parameters())
        kind, dtype = (device or weight.device).type, str(weight.dtype).removeprefix("torch.")
        threads = torch.get_num_threads() if kind == "cpu" else 0
        guided = (guidance.weight, guidance.rule, guidance.annealed) if guidance.weight else ()
        return cls(kind, threads, dtype, batch_size, tol, *guided)

    def guides_like(self, other: Conditions) -> bool:
        """Return whether the guidance is the same or nearly the same."""
        if not self.guidance or not other.guidance:
            return self.guidance == other.guidance
        same = (self.rule, self.annealed) == (other.rule, other.annealed)
        return same and _log_ratio(self.guidance, other.guidance) <= math.log(NEAR)

    def cover(self, call: Conditions) -> bool:
        """Return whether a measurement under these conditions holds for a call.

        Machine and dtype must be the same, batch size and guidance similar, and the tolerance of the call no smaller.
        """
        same = (self.device, self.threads, self.dtype) == (call.device, call.threads, call.dtype)
        similar = _log_ratio(self.batch_size, call.batch_size) <= math.log(NEAR) and self.guides_like(call)
        return same and similar and self.tol <= call.tol


@dataclasses.dataclass(frozen=True)
class Trial:
    """A solver that was tried on a block.

    The numbers are None for a solver that was stopped because it took too long.

    Args:
        method: method of the solver.
        window: window of the solver in tokens, 0 for all.
        neighbours: distances of the solver's quasi-Newton steps in tokens.
        seconds: median seconds per batch.
        passes: largest number of passes.
        tokens: tokens evaluated.
        error: largest absolute difference from the sequential result.
    """

    method: Method
    window: int = 0
    neighbours: tuple[int, ...] = ()
    seconds: float | None = None
    passes: int | None = None
    tokens: int | None = None
    error: float | None = None

    def __str__(self) -> str:
        return describe(self.method, self.window, self.neighbours)


@dataclasses.dataclass(frozen=True)
class BlockMeasurement:
    """Trials of a block, the sequential one first, and the index of the chosen one."""

    trials: tuple[Trial, ...]
    chosen: int

    @property
    def choice(self) -> Trial:
        """The chosen trial."""
        return self.trials[self.chosen]

    def __str__(self) -> str:
        """Return the chosen solver, and the sequential one or the fastest one that was not chosen in its place."""
        first, choice = self.trials[0], self.choice
        rivals = [(trial.seconds, i) for i, trial in enumerate(self.trials) if i and trial.seconds is not None]
        line = f"{choice}, {duration(choice.seconds or 0.0)}, {choice.passes} passes"
        if choice is not first:
            return f"{line}; sequential {duration(first.seconds or 0.0)}"
        if rivals:
            seconds, i = min(rivals)
            best = self.trials[i]
            line += f"; not chosen: {best}, {duration(seconds)}, {best.passes} passes, error {best.error:.1e}"
        return line

    def solver(self, tol: float) -> Solver:
        """Return the chosen solver with a tolerance."""
        return Solver(self.choice.method, self.choice.window, tol=tol, neighbours=self.choice.neighbours)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Measurements of all blocks of a flow under the same conditions.

    Args:
        conditions: the conditions.
        machine: name of the device, for reports.
        blocks: one measurement per block, in the order of the blocks.
    """

    conditions: Conditions
    machine: str
    blocks: tuple[BlockMeasurement, ...]

    def __str__(self) -> str:
        """Return the batch size and the times in one line."""
        before, after, batch_size = self.sequential_seconds, self.seconds, self.conditions.batch_size
        times = f"{duration(before)} sequential, {duration(after)} as chosen"
        return f"batch {batch_size}: {times}, speedup {before / after:.2f}"

    @property
    def seconds(self) -> float:
        """Seconds per batch with the chosen solvers."""
        return sum(block.choice.seconds or 0.0 for block in self.blocks)

    @property
    def sequential_seconds(self) -> float:
        """Seconds per batch with sequential solvers."""
        return sum(block.trials[0].seconds or 0.0 for block in self.blocks)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Measurements of one flow.

    Args:
        grid: rows and columns of tokens of its images.
        token_dim: values per token.
        measurements: measurements under different conditions.
    """

    grid: tuple[int, int]
    token_dim: int
    measurements: tuple[Measurement, ...] = ()

    def add(self, measurement: Measurement) -> Calibration:
        """Return a calibration with one more measurement, which replaces one under the same conditions."""
        others = [other for other in self.measurements if other.conditions != measurement.conditions]
        return dataclasses.replace(self, measurements=(*others, measurement))

    def find(self, call: Conditions) -> Measurement | None:
        """Return the measurement that covers a call and has the nearest batch size, or None."""
        covering = [m for m in self.measurements if m.conditions.cover(call)]
        return min(covering, key=lambda m: _log_ratio(m.conditions.batch_size, call.batch_size), default=None)


def describe(method: str, window: int, neighbours: tuple[int, ...]) -> str:
    """Return a solver in words."""
    if method == SEQUENTIAL:
        return method
    return f"{'quasi-Newton' if neighbours else method}, {f'window {window}' if window else 'all tokens'}"


def duration(seconds: float) -> str:
    """Return seconds in words, to three digits."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def save_calibration(calibration: Calibration | None, folder: str | Path) -> None:
    """Write a calibration into a checkpoint folder; None removes the one of earlier weights."""
    path = Path(folder) / SOLVERS
    if calibration is not None:
        write_text(path, json.dumps({"version": VERSION, **dataclasses.asdict(calibration)}, indent=1) + "\n")
        return
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StarflowError(f"cannot remove {path}: {error.strerror}") from None


def read_calibration(folder: str | Path, config: FlowConfig) -> Calibration | None:
    """Read the calibration of a checkpoint folder; None where there is none.

    Args:
        folder: the checkpoint folder.
        config: configuration of its flow.

    Raises:
        CheckpointError: the file is damaged or belongs to a flow of another shape.
    """
    path = Path(folder) / SOLVERS
    if not path.exists():
        return None
    try:
        settings = json.loads(path.read_bytes())
        if settings["version"] != VERSION:
            raise ValueError(f"version {settings['version']!r}, expected {VERSION}")
        measurements = tuple(_measurement(fields) for fields in settings["measurements"])
        calibration = Calibration(tuple(settings["grid"]), settings["token_dim"], measurements)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise CheckpointError(f"{path} is not a calibration ({reason}): delete it and calibrate again") from None
    expected = len(config.layers), config.grid, config.token_dim
    for measurement in measurements:
        shape = len(measurement.blocks), calibration.grid, calibration.token_dim
        if shape != expected:
            raise CheckpointError(
                f"{path} belongs to another flow, (blocks, grid, token_dim) are {shape} and not {expected}: delete it "
                "and calibrate again"
            )
    return calibration


def _measurement(fields: dict[str, Any]) -> Measurement:
    conditions, blocks = Conditions(**fields["conditions"]), []
    if conditions.batch_size < 1 or conditions.guidance < 0:
        raise ValueError(f"batch_size {conditions.batch_size}, guidance {conditions.guidance}")
    for i, block in enumerate(fields["blocks"]):
        trials = tuple(Trial(**{**trial, "neighbours": tuple(trial["neighbours"])}) for trial in block["trials"])
        measured = BlockMeasurement(trials, block["chosen"])
        if not isinstance(measured.chosen, int) or not 0 <= measured.chosen < len(trials):
            raise ValueError(f"block {i} chooses {measured.chosen} of {len(trials)} solvers")
        if trials[0].method != SEQUENTIAL or measured.choice.seconds is None:
            raise ValueError(f"block {i} has no time of the sequential solver or of the chosen one")
        # Raises ValueError for a solver that does not exist.
        measured.solver(conditions.tol)
        blocks.append(measured)
    return Measurement(conditions, fields["machine"], tuple(blocks))


def _log_ratio(one: float, other: float) -> float:
    return abs(math.log(one / other))
