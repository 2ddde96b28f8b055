"""Options for inverting a flow, and the solver that each block gets from them."""

from __future__ import annotations

import dataclasses
from typing import get_args

import torch

from starflow_kernels.solver import Method, Solver
from starflow_kernels.spec import Quantize

from ..errors import ConfigError
from ..models.calibration import Conditions
from ..models.flow import Flow
from ..models.guidance import Guidance
from ..settings import check_types

METHODS = get_args(Method)
TOLERANCE = Solver.tol
# In windows of at most this many rows, the token one row before helps less than it costs.
WINDOW_ROWS = 4


@dataclasses.dataclass(frozen=True)
class Inversion:
    """How to invert a flow.

    Args:
        method: "sequential" inverts token by token. "jacobi" inverts many tokens at once by fixed-point iteration with
            quasi-Newton steps, to the tolerance. "auto" takes the solver that `Flow.calibrate` measured to be fastest
            for each block, and "sequential" where no measurement covers the call.
        window: tokens that "jacobi" iterates together; None for all.
        tol: tolerance of the parallel solvers, see `starflow_kernels.Solver`; None for its default.
        quantize: "int8" or "fp8" rounds weights to one byte per value, "bfloat16" weights and inputs of products to
            two. This changes the images; "none" does not.

    Raises:
        ConfigError: A value is out of range.
    """

    method: str = "auto"
    window: int | None = None
    tol: float | None = None
    quantize: Quantize = "none"

    def __post_init__(self):
        check_types(self)
        if self.method not in ("auto", *METHODS):
            raise ConfigError(f"method={self.method!r}: expected auto or one of {', '.join(METHODS)}")
        if self.window is not None and self.method != "jacobi":
            raise ConfigError(f"window={self.window}: for method='jacobi', not {self.method!r}")
        if self.tol is not None and self.method == "sequential":
            raise ConfigError(f"tol={self.tol}: for method='jacobi' or 'auto', not 'sequential', which is exact")
        try:
            Solver("jacobi", self.window or 0, tol=self.tolerance)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    @property
    def tolerance(self) -> float:
        """The tolerance, `TOLERANCE` where none was given."""
        return TOLERANCE if self.tol is None else self.tol

    def solvers(self, flow: Flow, z: torch.Tensor, guidance: Guidance = Guidance()) -> list[Solver]:
        """Choose the solver of each block.

        Args:
            flow: the flow.
            z: (B, C, H, W) noise.
            guidance: guidance of the call.

        Returns:
            One solver per block, in the order of the blocks.
        """
        count, grid, measured = len(flow.blocks), flow.grid(z), None
        if self.method == "jacobi":
            window = self.window or 0
            return [Solver("jacobi", window, tol=self.tolerance, neighbours=neighbours(grid, window))] * count
        calibration = flow.calibration
        if self.method == "auto" and calibration and grid == calibration.grid and not guidance.tempered:
            # Offloaded weights may not be on the device of z yet.
            measured = calibration.find(Conditions.of(flow, len(z), guidance, self.tolerance, z.device))
        return [block.solver(self.tolerance) for block in measured.blocks] if measured else [Solver()] * count


def neighbours(grid: tuple[int, int], window: int) -> tuple[int, ...]:
    """Distances to the earlier tokens that a token depends on most.

    Args:
        grid: rows and columns of tokens.
        window: tokens that iterate together, 0 for all.

    Returns:
        1 for the previous token, and the number of columns for the token one row before where the window is large.
    """
    columns = grid[1]
    return (1, columns) if columns > 1 and not 0 < window <= WINDOW_ROWS * columns else (1,)
