"""Measurement of the fastest exact solver of each block of a flow, on a few draws on this machine."""

from __future__ import annotations

import dataclasses
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from starflow_kernels.solver import Solver, SolveReport

from ..errors import ConfigError
from ..models.calibration import BlockMeasurement, Conditions, Measurement, Trial
from ..models.flow import Flow
from ..models.guidance import Guidance
from ..seeds import generator
from ..settings import check_count
from .clock import device_time
from .request import TOLERANCE, Inversion, neighbours

# Multiples of the rows that a matrix product of the CPU kernels takes at a time; 0 for all tokens.
WINDOWS = (6, 12, 24, 48, 0)
DRAWS = 3
FINALISTS = 3
# A parallel solver is chosen if it takes at most this fraction of the sequential time.
WORTH = 0.95
# A solver is stopped when it takes this many times the sequential time.
HOPELESS = 3.0
# No larger window is tried after one that takes this many times the time of the best smaller one.
SLOWER = 1.5
# Seconds: shorter calls are timed several at a time, longer ones in fewer rounds.
SHORTEST = 5e-3
LONG = 0.1
ROUNDS = 5
ROUNDS_OF_LONG = 3


class Draw(NamedTuple):
    """Tokens (B, T, D) that enter each block while the flow samples, and the conditions of each block."""

    inputs: list[torch.Tensor]
    contexts: list


class GivenUp(Exception):
    """A solver takes too long."""


@torch.no_grad()
def calibrate(
    flow: Flow,
    batch_size: int,
    guidance: Guidance = Guidance(),
    tol: float = TOLERANCE,
    windows: Sequence[int] = WINDOWS,
    text: torch.Tensor | None = None,
    empty_text: torch.Tensor | None = None,
    seed: int = 0,
    on_block: Callable[[int, BlockMeasurement], None] = lambda block, measured: None,
) -> Measurement:
    """Measure the sequential solver and the parallel ones, with and without neighbours, on every block.

    A parallel solver is chosen if it wins by 5 % over draws and repetitions, and if its result equals the sequential
    one to ten times the tolerance.

    Args:
        flow: the flow.
        batch_size: images per batch.
        guidance: guidance of the samples.
        tol: tolerance of the parallel solvers.
        windows: windows in tokens, 0 for all, tried from the smallest on until they get slower.
        text: (N, L, text_dim) text states, used in turn.
        empty_text: (1, L, text_dim) states that guidance moves away from.
        seed: seed of the draws.
        on_block: called as on_block(block, measurement) after each block, the last block first.

    Returns:
        The measurement of all blocks.

    Raises:
        ConfigError: a number is out of range, the guidance has a temperature, or the flow needs text and none is given.
    """
    batch_size = check_count("batch_size", batch_size)
    windows = [check_count("windows", window, 0) for window in windows]
    tol = Inversion("jacobi", tol=tol).tolerance
    if guidance.tempered:
        raise ConfigError("an attention temperature has no calibration: such guidance is sampled one token at a time")
    if flow.config.text_dim and (text is None or not len(text)):
        raise ConfigError("a flow of text is calibrated on states of prompts: calibrate the folder of its pipeline")
    conditions = Conditions.of(flow, batch_size, guidance, tol, flow.device)
    grid = flow.config.grid
    tokens = math.prod(grid)
    windows = sorted({window for window in windows if 0 < window < tokens}) + [0] * (0 in windows)
    draws = [_draw(flow, batch_size, guidance, text, empty_text, seed, number) for number in range(DRAWS)]
    blocks: list[BlockMeasurement] = []
    for i in reversed(range(len(flow.blocks))):
        race = _Race(flow, i, guidance, draws)
        rivals = [
            [Solver("jacobi", window, tol=tol, neighbours=near) for near in ((), neighbours(grid, window))]
            for window in windows
        ]
        blocks.insert(0, BlockMeasurement(*race.run(Solver(tol=tol), rivals)))
        on_block(i, blocks[0])
    return Measurement(conditions, _machine(flow.device), tuple(blocks))


def _draw(flow: Flow, count: int, guidance: Guidance, text, empty_text, seed: int, number: int) -> Draw:
    z, classes = flow.noise(count, generator(seed, number)), flow.config.num_classes
    turns = torch.arange(count, dtype=torch.int64, device="cpu") + number
    labels = (turns % classes).to(flow.device) if classes else None
    text = None if text is None else text[turns % len(text)].to(flow.device)
    results: dict[int, torch.Tensor] = {}

    def keep(block: int, x: torch.Tensor) -> torch.Tensor:
        results[block] = flow.tokens(x)
        return x

    flow.inverse(z, labels, text, guidance, empty_text, after_block=keep)
    inputs = [results[i] for i in range(1, len(flow.blocks))] + [flow.tokens(z)]
    return Draw(inputs, flow.contexts(labels, text, z, guidance, empty_text))


class _Race:
    """Comparison of the solvers of one block."""

    def __init__(self, flow: Flow, block: int, guidance: Guidance, draws: list[Draw]):
        self.block, self.draws, self.device = flow.blocks[block], [], flow.device
        for draw in draws:
            z, (context, guided) = draw.inputs[block], draw.contexts[block]
            options = guidance.options(z.shape[1], self.block.spec.start, z.device) if guided else {}
            rotary = flow.rotary(block, flow.config.grid, z)
            self.draws.append((z, (*context, rotary), options))
        self.eps = torch.finfo(next(flow.parameters()).dtype).eps

    def run(self, sequential: Solver, rivals: list[list[Solver]]) -> tuple[tuple[Trial, ...], int]:
        """Try each solver; return the trials, the sequential one first, and the index of the chosen one.

        Args:
            sequential: the sequential solver.
            rivals: parallel solvers of each window, the smallest window first.
        """
        self._time(sequential, 0)
        base, expected, report = self._time(sequential, 0)
        self.repeat = max(1, min(50, round(SHORTEST / base)))
        self.rounds = ROUNDS if base < LONG else ROUNDS_OF_LONG
        allowed = 10 * max(sequential.tol, 10 * self.eps) * max(1.0, expected.abs().max().item())
        solvers, trials = [sequential], [_trial(sequential, base, report, 0.0)]
        best = math.inf
        for window in rivals:
            tried = [self._try(solver, HOPELESS * max(base, SHORTEST), expected) for solver in window]
            solvers += window
            trials += tried
            fastest = min((trial.seconds for trial in tried if trial.seconds is not None), default=math.inf)
            if fastest > SLOWER * best:
                break
            best = min(best, fastest)
        exact = [n for n, trial in enumerate(trials) if n and trial.seconds is not None and trial.error <= allowed]
        finalists = sorted(exact, key=lambda n: trials[n].seconds)[:FINALISTS]
        chosen = self._winner(solvers, trials, finalists) if finalists else 0
        if chosen:
            # The best of several may have been lucky, so it must win once more against the sequential solver alone.
            chosen = self._winner(solvers, trials, [chosen])
        return tuple(trials), chosen

    def _try(self, solver: Solver, limit: float, expected: torch.Tensor) -> Trial:
        try:
            first, x, report = self._time(solver, 0, limit)
        except GivenUp:
            return _trial(solver)
        again = [self._time(solver, 0)[0] for _ in range(min(3, self.repeat) - 1)]
        return _trial(solver, statistics.median([first, *again]), report, (x - expected).abs().max().item())

    def _winner(self, solvers: list[Solver], trials: list[Trial], finalists: list[int]) -> int:
        """Return the index of the finalist that wins, 0 for none; write median times into `trials`."""
        numbers = [0, *finalists]
        rounds = [self._round([solvers[n] for n in numbers], number) for number in range(self.rounds)]
        for n, seconds in zip(numbers, zip(*rounds)):
            trials[n] = dataclasses.replace(trials[n], seconds=statistics.median(seconds))
        ratios = {n: sorted(times[k] / times[0] for times in rounds) for k, n in enumerate(numbers) if n}
        # A solver wins if its median is faster by a margin, and if it is faster in all rounds but one.
        worth = {n: statistics.median(r) for n, r in ratios.items() if statistics.median(r) <= WORTH and r[-2] < 1}
        return min(worth, key=worth.get, default=0)

    def _round(self, solvers: list[Solver], number: int) -> list[float]:
        """Return the median seconds of each solver on a draw; the solvers take turns call by call."""
        times: list[list[float]] = [[] for _ in solvers]
        for turn in range(self.repeat):
            for k in range(len(solvers)):
                k = (k + turn + number) % len(solvers)
                times[k].append(self._time(solvers[k], number % len(self.draws))[0])
        return [statistics.median(seconds) for seconds in times]

    def _time(self, solver: Solver, draw: int, limit: float = math.inf) -> tuple[float, torch.Tensor, SolveReport]:
        z, context, options = self.draws[draw]

        def watch(done: int, total: int) -> None:
            if time.perf_counter() - start > limit:
                raise GivenUp

        if limit < math.inf:
            options = {**options, "progress": watch}
        start = device_time(self.device)
        found = self.block.inverse(z, *context, solver=solver, **options)
        return device_time(self.device) - start, found.x, found.report


def _trial(solver: Solver, seconds=None, report: SolveReport | None = None, error=None) -> Trial:
    counts = (None, None) if report is None else (report.passes, report.tokens)
    return Trial(solver.method, solver.window, solver.neighbours, seconds, *counts, error)


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()
