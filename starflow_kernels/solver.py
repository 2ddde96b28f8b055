"""Choice of a solver for the sampling direction, and the report of a solve."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Callable
from typing import Any

import torch

from .spec import Guess, Method, check_choice, check_not_negative, scalar

# Distances are at most this; no sequence is longer.
FARTHEST = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Solver:
    """Solver of x = mu(x) + sigma(x) z for x, where the parameters of token t depend only on earlier tokens.

    Args:
        method: "sequential", token by token, or "jacobi", the fixed-point iteration x <- mu(x) + sigma(x) z on many
            tokens at once. Both solve the same equation: after k Jacobi sweeps the first k tokens are exact.
        window: number of tokens that Jacobi iterates together, 0 for all.
        slide: with True, a token leaves the window as soon as it and all tokens before it have converged, and a new one
            enters at the back. With False, the next window begins once all tokens of this one have converged.
        guess: initial value of a token: its noise, or zeros.
        tol: a token has converged when a sweep changes no value v of it by more than tol max(1, |v|). With 0, it has
            converged when it repeats bit for bit.
        neighbours: ascending distances, in tokens of the block's own order, to the earlier tokens on which a token
            depends most, such as (1, 16) for rows of 16. They turn sweeps into quasi-Newton steps; () is plain Jacobi.
    """

    method: Method = "sequential"
    window: int = 0
    slide: bool = True
    guess: Guess = "noise"
    tol: float = 5e-7
    neighbours: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_choice("method", self.method, Method)
        check_choice("guess", self.guess, Guess)
        if type(self.slide) is not bool:
            raise TypeError(f"slide={self.slide!r}: expected bool")
        window, tol = scalar(self.window), check_not_negative("tol", self.tol)
        if not _is_integer(window) or window < 0:
            raise ValueError(f"window={reprlib.repr(window)}: expected a number of tokens, 0 for all")
        try:
            distances = tuple(map(scalar, self.neighbours))
        except TypeError:
            raise TypeError(f"neighbours={self.neighbours!r}: expected a tuple of integers") from None
        if not all(map(_is_integer, distances)):
            raise TypeError(f"neighbours={reprlib.repr(distances)}: expected a tuple of integers")
        if list(distances) != sorted(set(distances)) or not all(1 <= k <= FARTHEST for k in distances):
            raise ValueError(f"neighbours={reprlib.repr(distances)}: expected ascending distances from 1 to 2^31 - 1")
        for name, value in (("window", window), ("tol", tol), ("neighbours", distances)):
            object.__setattr__(self, name, value)


def check_solver(value: object) -> None:
    """Raise TypeError unless `value` is a Solver."""
    if not isinstance(value, Solver):
        raise TypeError(f"solver: expected a Solver, got {type(value).__name__}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class SolveReport:
    """Work and accuracy of one solve.

    Attributes:
        method: the method that ran.
        passes: number of network passes, one after the other, of the sample that needed the most.
        tokens: token evaluations, summed over passes and samples.
        seconds: wall time.
        sweeps: (B, T) int32, number of passes in which each token took part, in the block's own order.
        residual: largest change of a value v in the pass that accepted it, relative to max(1, |v|). It is 0 if every
            token was computed from exact ones.
        fallbacks: number of samples with a window that diverged and was solved token by token.
        certificate: max |forward(x) - z| of one density pass over the result, None unless requested.
    """

    method: Method
    passes: int
    tokens: int
    seconds: float
    sweeps: torch.Tensor
    residual: float = 0.0
    fallbacks: int = 0
    certificate: float | None = None


class Inverse:
    """Result of an inverse of a flow.

    `logdet` and `report` are computed when they are read first.

    Args:
        x: (B, T, D) data.
        logdet: logdet() returns log|det dx/dz|, (B,).
        report: report() returns the work and accuracy of the solve.
    """

    def __init__(self, x: torch.Tensor, logdet: Callable[[], torch.Tensor], report: Callable[[], SolveReport]) -> None:
        self.x = x
        self._logdet, self._report = logdet, report
        self._kept: dict[str, Any] = {}

    def __reduce__(self) -> tuple:
        """Compute what has not been read yet, since what computes it cannot be pickled."""
        return _read, (self.x, self.logdet, self.report)

    def to(self, *arguments: Any, **options: Any) -> Inverse:
        """Return the result with tensors converted as by `torch.Tensor.to`, which hooks of accelerate call."""
        return Inverse(
            self.x.to(*arguments, **options), lambda: self.logdet.to(*arguments, **options), lambda: self.report
        )

    @property
    def logdet(self) -> torch.Tensor:
        """(B,) log|det dx/dz|, float32 or wider, with a gradient if x has one."""
        if "logdet" not in self._kept:
            self._kept["logdet"] = self._logdet()
        return self._kept["logdet"]

    @property
    def report(self) -> SolveReport:
        """Work and accuracy of the solve."""
        if "report" not in self._kept:
            self._kept["report"] = self._report()
        return self._kept["report"]


def _read(x: torch.Tensor, logdet: torch.Tensor, report: SolveReport) -> Inverse:
    return Inverse(x, lambda: logdet, lambda: report)


def sum_log_sigma(log_sigma: torch.Tensor) -> torch.Tensor:
    """Return the log-determinant (B,) from log sigma (B, T, D), summed in float64."""
    return log_sigma.sum((1, 2), dtype=torch.float64).to(torch.promote_types(log_sigma.dtype, torch.float32))
