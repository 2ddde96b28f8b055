"""How the sampling direction is solved, and what solving it took."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

from .spec import check_choice

Method = Literal["sequential", "jacobi"]
Guess = Literal["noise", "zero"]
# A window of values that leaves this many times the size of its noise is given up.
DIVERGED = 1e6


@dataclasses.dataclass(frozen=True)
class Solver:
    """How x = mu(x) + sigma(x) z, whose token t depends on earlier tokens alone, is solved for x.

    method: "sequential", one token after the other, or "jacobi", x <- mu(x) + sigma(x) z for many tokens at once until
        x stands still, which gives the same x: after k sweeps the first k tokens are exact.
    window: tokens that iterate together, 0 for all. slide: tokens at the front of the window that stand still are done
        and new ones enter at its back; otherwise all of a window are done before the next ones begin.
    guess: first values of a token, its noise or zeros.
    tol: tokens stand still when a sweep changes none of their values v by more than tol max(1, |v|); 0: when they
        repeat bit for bit.
    neighbours: ascending distances, in tokens of the block's own order, of earlier tokens that a token depends on most:
        (1, 16) in rows of 16. They turn sweeps into quasi-Newton steps; () is plain Jacobi.
    """

    method: Method = "sequential"
    window: int = 0
    slide: bool = True
    guess: Guess = "noise"
    tol: float = 5e-7
    neighbours: tuple[int, ...] = ()

    def __post_init__(self):
        check_choice("method", self.method, Method)
        check_choice("guess", self.guess, Guess)
        if not isinstance(self.window, int) or self.window < 0:
            raise ValueError(f"window={self.window!r}: expected a number of tokens, 0 for all")
        if not 0 <= self.tol < float("inf"):
            raise ValueError(f"tol={self.tol}: expected a finite number >= 0")
        object.__setattr__(self, "neighbours", tuple(self.neighbours))
        if list(self.neighbours) != sorted(set(self.neighbours)) or any(k < 1 for k in self.neighbours):
            raise ValueError(f"neighbours={self.neighbours}: expected ascending distances of at least 1")


@dataclasses.dataclass(frozen=True)
class SolveReport:
    """What a solver did.

    passes: calls of the network one after the other, those of the sample that took most. tokens: tokens that it
    evaluated, over all passes and samples. seconds: wall time. sweeps: (B, T) int32, in how many passes each token took
    part, in the block's own order. residual: the largest change of a value v in the pass that it was accepted in, over
    max(1, |v|), 0 where every token followed from exact ones. fallbacks: samples of which a window diverged and was
    solved one token a pass. certificate: on request, max |forward(x) - z| of one density pass over the result.
    """

    method: Method
    passes: int
    tokens: int
    seconds: float
    sweeps: torch.Tensor
    residual: float = 0.0
    fallbacks: int = 0
    certificate: float | None = None
