"""Order and lengths of the tokens of a call.

Ops know neither. A block with an order is the block in its own order on rearranged tokens, whose positions become part
of a condition per token. Tokens beyond the length of a sample are the last of its order, so no other token sees them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .._core.checks import check_tensor
from .._core.numerics import accumulation_dtype
from .._core.token_order import check_counts, own_order, take, with_given
from .._core.torch_private import is_intercepted
from ..spec import BlockSpec


class Layout(NamedTuple):
    """Arguments of a call of the ops, and the way of tokens to its slots and back.

    Attributes:
        spec: the block of the ops.
        weights: its weights, in the order of `spec.weight_shapes`.
        cond: condition in the order of the slots: (rows, C), (rows, slots, C), or None.
        tokens: number of tokens T.
        slots: number of slots T' <= T; the tokens of no sample need more.
        order: (B, T) number of the token in each slot, or None where token t is in slot t.
        inside: (B, T) whether token t belongs to its sample, and also slot t; None where all do.
    """

    spec: BlockSpec
    weights: list[torch.Tensor]
    cond: torch.Tensor | None
    tokens: int
    slots: int
    order: torch.Tensor | None = None
    inside: torch.Tensor | None = None

    @property
    def moves(self) -> bool:
        """Whether `enter` changes anything."""
        return self.order is not None or self.inside is not None

    def angles(self, table: torch.Tensor | None) -> torch.Tensor | None:
        """Return the rows of a table of rotary angles for the prefix and the slots."""
        if table is None or self.slots == self.tokens:
            return table
        return table[: len(table) - self.tokens + self.slots]

    def enter(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return tokens (B, T, D) in the order of the slots (B, T', D), zero beyond the lengths."""
        if not self.moves:
            return tokens
        tokens = take(tokens, self.order)[:, : self.slots]
        if self.inside is None:
            return tokens
        return tokens.masked_fill(~self.inside[:, : self.slots, None], 0)

    def begin(
        self, noise: torch.Tensor, data: torch.Tensor | None, known: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return noise (B, T', D) with the given tokens in their slots, and the numbers of given tokens (B,), if any.

        Args:
            noise: what `enter` returned.
            data: as in `block_inverse`.
            known: as in `block_inverse`.

        Raises:
            TypeError: data or known of the wrong kind or dtype.
            ValueError: data or known of the wrong shape or value, or one without the other.
        """
        if known is None and data is None:
            return noise, None
        given, counts = None, None
        if known is not None:
            counts = check_counts("known", known, len(noise), self.tokens).to(noise.device).clamp(max=self.slots)
            given = torch.arange(self.slots, dtype=torch.int64, device=noise.device) < counts[:, None]
            given = given.flip(1) if self.spec.flip else given
            given = given if self.inside is None else given & self.inside[:, : self.slots]
        if data is not None:
            check_tensor("data", data, (len(noise), self.tokens, noise.shape[2]), like=noise)
            data = self.enter(data)
        return with_given(noise, data, given), counts

    def rank(self) -> torch.Tensor:
        """Return the slot of each token, (T,) or (B, T)."""
        if self.order is not None:
            return self.order.argsort(1)
        numbers = torch.arange(self.tokens, dtype=torch.int64, device=self.weights[0].device)
        return numbers.flip(0) if self.spec.flip else numbers

    def given(self, known: torch.Tensor | None) -> torch.Tensor | None:
        """Return whether each token (B, T) is one of the first `known` (B,) of its sample; None where none is."""
        if known is None:
            return None
        given = self.rank() < known[:, None]
        return given if self.inside is None else given & self.inside

    def reduce(self, values: torch.Tensor, logdet: str) -> torch.Tensor:
        """Return the sum or mean of values (B, T, D), which are zero beyond the lengths, over the tokens of a sample.

        The sum is in float64, like that of the kernels, so that zeros do not change its bits.
        """
        total = values.sum(dim=(1, 2), dtype=torch.float64)
        if logdet == "mean":
            count = values.shape[1] if self.inside is None else self.inside.sum(1).clamp(min=1)
            total = total / (count * values.shape[2])
        return total.to(values.dtype)

    def leave(self, values: torch.Tensor, outside: torch.Tensor) -> torch.Tensor:
        """Return values of slots (B, T', D) in the order of the tokens, and `outside` (B, T, D) beyond the lengths."""
        if self.order is not None:
            places = self.order[:, : self.slots, None].expand(values.shape)
            values = outside.scatter(1, places, values)
        elif self.slots < outside.shape[1]:
            values = torch.cat([values, outside[:, self.slots :]], 1)
        return values if self.inside is None else torch.where(self.inside[:, :, None], values, outside)


def arrange(
    tokens: torch.Tensor,
    weights: list[torch.Tensor],
    spec: BlockSpec,
    cond: torch.Tensor | None,
    order: torch.Tensor | None,
    lengths: torch.Tensor | None,
    branches: int = 1,
    cond_in_order: bool = False,
) -> Layout:
    """Return the layout of a call.

    Args:
        tokens: as x in `block_forward`.
        weights: weights in the order of `spec.weight_shapes`.
        spec: as in `block_forward`.
        cond: as in `block_forward`, of branches * B rows.
        order: as in `block_forward`.
        lengths: as in `block_forward`.
        branches: 2 under guidance.
        cond_in_order: as in `block_forward`.

    Raises:
        TypeError: order or lengths of the wrong kind or dtype.
        ValueError: order or lengths of the wrong shape or value.
    """
    B, T, _ = tokens.shape
    if order is None and lengths is None:
        flipped = cond is not None and cond.ndim == 3 and spec.flip and not cond_in_order
        return Layout(spec, weights, cond.flip(1) if flipped else cond, T, T)
    if order is not None and spec.flip:
        raise ValueError("order: given, but the block has an order of its own, flip=True")
    index, counts = own_order(order, lengths, B, T, tokens.device, spec.flip)
    inside, slots = None, T
    if counts is not None:
        inside = torch.arange(T, dtype=torch.int64, device=tokens.device) < counts
        if B and not is_intercepted():
            slots = max(1, int(counts.max()))
    if cond is not None and cond.ndim == 3:
        moves = index is not None and not cond_in_order
        cond = take(cond, index.repeat(branches, 1) if moves else None)[:, :slots]
        if inside is not None:
            cond = cond.masked_fill(~inside[:, :slots, None].repeat(branches, 1, 1), 0)
    if spec.positions:
        named = dict(zip(spec.weight_shapes, weights))
        table = named.pop("pos_embed")
        # The sum with the condition is not rounded to a narrow dtype.
        table = table.to(accumulation_dtype(table.dtype))
        rows = table.expand(B, -1, -1) if index is None else table[index]
        rows = rows[:, :slots].repeat(branches, 1, 1)
        weights = list(named.values())
        if cond is not None:
            # Modulations, which follow the channels that are added, do not depend on the position.
            rows = torch.nn.functional.pad(rows, (0, cond.shape[-1] - rows.shape[-1]))
            cond = cond if cond.ndim == 3 else cond[:, None]
        cond = rows if cond is None else rows + cond
    return Layout(spec.own_order, weights, cond, T, slots, index, inside)
