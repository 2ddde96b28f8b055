"""Base of the fast blocks, which compares them with their original methods again when their parts change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from ..swap import Accelerated, seen_as
from .structure import Unfit, read

# Classes of blocks and of their parts that agree with their original methods.
_agreed: set[tuple[type, ...]] = set()


class Checked(Accelerated):
    """Block whose fast methods agree with the original ones, given the classes of its parts.

    Attributes:
        compare: compare(module) returns in what they differ, or None.
    """

    description = "packed inverse, fused density"
    compare: ClassVar[Callable[[nn.Module], str | None]]

    @classmethod
    def check(cls, module: Any) -> str | None:
        """Return in what the fast methods differ from the original ones on random tokens, or None."""
        with torch.autocast(module.proj_in.weight.device.type, enabled=False):
            reason = cls.compare(module)
        if reason is None:
            _agreed.add((cls.original, *read(module)[2]))
        return reason

    def check_parts(self: Any, classes: tuple[type, ...]) -> None:
        """Raise Unfit if parts of other classes have been put into the block that compute something else.

        Args:
            classes: classes of its parts.
        """
        if (self.original, *classes) in _agreed:
            return
        try:
            reason = self.check(seen_as(self.original, self))
        # Whatever the code of another structure raises, the original method runs.
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        if reason:
            raise Unfit(reason)
