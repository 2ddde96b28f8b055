"""Orders of the tokens in the blocks of a `TokenFlow`, and how many of the tokens are known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from starflow_kernels._core.token_order import check_counts, own_order

from .block import FlowBlock
from .stack import BlockArguments

Order = torch.Tensor | Sequence[torch.Tensor] | None


def block_orders(
    blocks: Sequence[FlowBlock],
    described: Sequence[Sequence[int]],
    order: Order,
    known: torch.Tensor | None,
    tokens: torch.Tensor,
) -> list[torch.Tensor | None]:
    """Return the order of each block that differs from the one in its description.

    Args:
        blocks: blocks of the flow.
        described: order of each block in the configuration, () where it has none.
        order: as in `TokenFlow.forward`.
        known: as in `TokenFlow.forward`.
        tokens: (B, T, D).

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument of the wrong shape or value.
    """
    count, T, _ = tokens.shape
    each = None
    if isinstance(order, Sequence):
        if len(order) != len(blocks):
            raise ValueError(f"order: {len(order)} of them for {len(blocks)} blocks")
        each, order = [own_order(own, None, count, T, tokens.device)[0] for own in order], None
    elif order is not None:
        order, _ = own_order(order, None, count, T, tokens.device)
    if known is not None:
        known = check_counts("known", known, count, T)
    found: list[torch.Tensor | None] = []
    for i, block in enumerate(blocks):
        own, flip = order, block.spec.flip
        if each is not None:
            own = each[i]
        elif described:
            stored = torch.tensor(described[i], dtype=torch.int64, device=tokens.device)
            own = stored if order is None else order[:, stored]
        elif order is not None and flip:
            own = order.flip(1)
        # Known tokens come first, as those beyond the lengths come last.
        found.append(own if known is None else own_order(own, known, count, T, tokens.device, flip)[0])
    return found


def of_known(
    arguments: Iterable[BlockArguments], known: torch.Tensor, lengths: torch.Tensor | None, tokens: torch.Tensor
) -> list[BlockArguments]:
    """Return the arguments of the blocks for the known tokens alone, whose conditions look ahead to the others.

    Args:
        arguments: arguments of the blocks for all tokens.
        known: integers (B,).
        lengths: integers (B,), or None.
        tokens: (B, T, D).
    """
    found, (rows, count, _) = [], tokens.shape
    for context, options in arguments:
        order, _ = own_order(options["order"], lengths, rows, count, tokens.device)
        found.append(BlockArguments(context, {"order": order, "lengths": known}))
    return found


def shorter(known: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """Return how many tokens of each sample are known, which are at most its length.

    Args:
        known: integers (B,).
        lengths: integers (B,), or None.
    """
    if lengths is None:
        return known
    return torch.minimum(known.to(torch.int64), lengths.to(device=known.device, dtype=torch.int64))
