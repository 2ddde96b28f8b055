"""Order in which the tokens of each sample depend on each other: its arguments, and their checks."""

from __future__ import annotations

import reprlib

import torch

from .checks import check_finite, format_shape
from .torch_private import is_intercepted


def _check_integers(name: str, value: object, shapes: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    """Return an integer tensor of one of these shapes as int64."""
    if (
        not isinstance(value, torch.Tensor)
        or value.dtype == torch.bool
        or value.is_floating_point()
        or value.is_complex()
    ):
        given = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected an integer tensor, got {given}")
    if tuple(value.shape) not in shapes:
        raise ValueError(
            f"{name}: expected shape {' or '.join(map(format_shape, shapes))}, got {format_shape(value.shape)}"
        )
    # A copy, since the caller may change its own before a result is read.
    return value.to(torch.int64, copy=True)


def _check_order(value: object, rows: int, tokens: int) -> torch.Tensor:
    """Return an order as int64, or raise TypeError or ValueError. Its values are checked outside of graphs alone.

    Args:
        value: expected shape (tokens,) or (rows, tokens).
        rows: number of samples.
        tokens: number of tokens.
    """
    order = _check_integers("order", value, ((tokens,), (rows, tokens)))
    if is_intercepted():
        return order
    wrong = order.sort(-1).values != torch.arange(tokens, dtype=torch.int64, device=order.device)
    if wrong.any():
        row = order if order.ndim == 1 else order[wrong.any(1).nonzero()[0, 0]]
        raise ValueError(f"order: expected a permutation of 0 .. {tokens - 1}, got {reprlib.repr(row.tolist())}")
    return order


def check_counts(name: str, value: object, rows: int, tokens: int) -> torch.Tensor:
    """Return numbers of tokens (rows,) from 0 to `tokens` as int64, or raise TypeError or ValueError.

    Their values are checked outside of graphs alone.
    """
    counts = _check_integers(name, value, ((rows,),))
    if not is_intercepted() and rows and not (int(counts.min()) >= 0 and int(counts.max()) <= tokens):
        raise ValueError(f"{name}: expected numbers from 0 to {tokens}, got {reprlib.repr(counts.tolist())}")
    return counts


def own_order(
    order: object, lengths: object, rows: int, tokens: int, device: torch.device, flip: bool = False
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the numbers of the tokens in their own order, those beyond the length of a sample last, and the lengths.

    Args:
        order: integers (tokens,) or (rows, tokens), or None.
        lengths: integers (rows,), or None.
        rows: number of samples.
        tokens: number of tokens.
        device: device of the result.
        flip: whether the order is descending if `order` is None.

    Returns:
        int64 (rows, tokens), or None for the ascending order; int64 (rows, 1), or None.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: an argument of the wrong shape or value.
    """
    index = None
    if order is not None:
        index = _check_order(order, rows, tokens).to(device).expand(rows, tokens)
    elif flip:
        index = torch.arange(tokens - 1, -1, -1, dtype=torch.int64, device=device).expand(rows, tokens)
    if lengths is None:
        return index, None
    counts = check_counts("lengths", lengths, rows, tokens).to(device)[:, None]
    if index is not None:
        index = index.gather(1, (index >= counts).to(torch.int8).argsort(dim=1, stable=True))
    return index, counts


def take(values: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """Return values (B, T, D) in the order of `index` (B, T); None leaves them."""
    return values if index is None else values.gather(1, index[:, :, None].expand(-1, -1, values.shape[-1]))


def with_given(noise: torch.Tensor, data: torch.Tensor | None, given: torch.Tensor | None) -> torch.Tensor:
    """Return noise (B, T, D) with the values of data (B, T, D) where a token is given (B, T); those are finite.

    Raises:
        ValueError: one of data and given is None and the other is not.
    """
    if (data is None) != (given is None):
        raise ValueError("data, known: one is given without the other")
    if data is None or given is None:
        return noise
    data = data.to(noise.dtype).masked_fill(~given[..., None], 0)
    if not is_intercepted():
        check_finite(data=data)
    return torch.where(given[..., None], data, noise)
