"""Autoregressive flows of normflows, which are copies of those of nflows."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from . import nflows
from .swap import Accelerated, loaded


def candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, type[Accelerated] | str]]:
    """Return name, module, and fast class or reason of the flows in a model."""
    return nflows.autoregressive(
        model, loaded("normflows.flows.affine.autoregressive", "Autoregressive"), loaded("normflows.nets.made", "MADE")
    )
