"""Guard against steps that would spoil the weights."""

from __future__ import annotations

import math
import warnings
from typing import Any

from ..errors import StarflowError

# Steps that determine the running average before a spike is judged by it.
FIRST_STEPS = 20
DECAY = 0.98
# Attributes of a guard that a checkpoint holds.
STATE = {"skipped": int, "_in_a_row": int, "_taken": int, "_average": float}


class Guard:
    """Judge of each step by its loss and its gradient norm.

    Attributes:
        skipped: number of steps that were skipped.

    Args:
        factor: a gradient norm above this many times its running average is a spike; 0 knows no spikes.
        max_skips: steps in a row that may be skipped.
        speaks: whether to warn of a skipped step.
    """

    def __init__(self, factor: float, max_skips: int, speaks: bool = True):
        self.factor, self.max_skips, self.speaks = factor, max_skips, speaks
        self.skipped = self._in_a_row = self._taken = 0
        self._average = 0.0

    def accepts(self, step: int, loss: float, norm: float) -> bool:
        """Return whether a step should be taken.

        Args:
            step: number of the step, for messages.
            loss: loss of the step.
            norm: norm of its gradient before clipping.

        Raises:
            StarflowError: more than `max_skips` steps in a row are to be skipped.
        """
        reason, advice = self._reason(loss, norm)
        if not reason:
            self._in_a_row = 0
            self._taken += 1
            # The mean of the first steps, then a moving average.
            self._average += (norm - self._average) * max(1 / self._taken, 1 - DECAY)
            return True
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row > self.max_skips:
            before = f", after {self.max_skips} skipped steps in a row" if self.max_skips else ""
            raise StarflowError(
                f"{reason} at step {step}{before}: nothing was saved since the last checkpoint; "
                f"begin a new run with {advice}"
            )
        if self.speaks:
            warnings.warn(f"{reason} at step {step}: the step is skipped", stacklevel=3)
        return False

    def _reason(self, loss: float, norm: float) -> tuple[str, str]:
        """Return why a step should be skipped, and what to change; empty texts if it should be taken."""
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                return f"the {name} is {value}", "a lower training.learning_rate"
        if self.factor and self._taken >= FIRST_STEPS and norm > self.factor * self._average:
            reason = f"the gradient norm is {norm:.4g}, its running average {self._average:.4g},"
            return reason, f"a training.spike_factor above {self.factor:g}, or a lower training.learning_rate"
        return "", ""

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        return {name.lstrip("_"): getattr(self, name) for name in STATE}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned.

        Raises:
            ValueError: a number is missing, or is none.
        """
        for name, kind in STATE.items():
            value = state.get(name.lstrip("_"))
            if type(value) not in (int, kind) or not 0 <= value < math.inf:
                raise ValueError(f"{name.lstrip('_')}={value} of a guard is no {kind.__name__} of at least 0")
            setattr(self, name, kind(value))
