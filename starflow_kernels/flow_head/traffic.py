"""Model of the time of flow_head on a GPU: bytes and operations per token. It chooses between the backends.

Each step takes the longest of its bytes of device memory, its bytes of the L2 cache and its operations, at the rates of
`_core.rates`. The Triton kernels read the states once, but all weights once per BLOCK_T tokens. The composed backend
reads the weights once per TILE tokens, as torch's products do, but writes and reads the normalized states and the raw
parameters.

The composed backend is chosen where it is predicted to be MARGIN times as fast: the rates are estimates, it needs more
memory, and only the Triton kernels promise a row the same bits in every batch. The choice depends on widths, dtypes and
chip, never on the number of rows or tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .._core.rates import FLOAT32, L2, MEMORY, TENSOR
from .._triton import runtime
from .._triton.tiles import chip_of
from .tiles import WIDEST, config

# Rows and columns of a tile of torch's products.
TILE = 128
MARGIN = 1.5
DESCRIPTION = "for wide tokens, by a model of bytes that no GPU has confirmed yet"


class Sizes(NamedTuple):
    """Widths of a call, per token.

    D: values per token. C: channels. P: raw parameters. token, state, weight: bytes per value of x, of h, and of the
    weight. norm: whether there is a norm.
    """

    D: int
    C: int
    P: int
    token: int
    state: int
    weight: int
    norm: bool


class Step(NamedTuple):
    """Work of a kernel per token: bytes of device memory, bytes of the L2 cache, operations of matrix products."""

    memory: float
    cache: float = 0
    operations: float = 0


def seconds(steps: list[Step], weight: int) -> float:
    """Return the time per token of steps in a row, with weights of this many bytes per value."""
    peak = TENSOR if weight == 2 else FLOAT32
    return sum(max(step.memory / MEMORY, step.cache / L2, step.operations / peak) for step in steps)


def _product(inputs: float, outputs: float, width: int) -> Step:
    """Return a product of torch with one factor of all tokens and one of the weight."""
    cache = width * (inputs * -(-outputs // TILE) + inputs * outputs / TILE)
    return Step(width * (inputs + outputs), cache, 2 * inputs * outputs)


def _weight_gradient(sizes: Sizes) -> Step:
    """Return the product over all tokens, which reads both factors from memory."""
    return Step(sizes.weight * (sizes.P + sizes.C), 0, 2 * sizes.P * sizes.C)


def fused(sizes: Sizes, block: int) -> list[Step]:
    """Return the forward pass of the Triton kernels with blocks of this many tokens."""
    D, C, P, token, state, weight, _ = sizes
    return [Step(C * state + 2 * D * token, C * state + P * C * weight / block, 2 * C * P)]


def fused_backward(sizes: Sizes, block: int) -> list[Step]:
    """Return the backward pass of the Triton kernels, which stores two float32 gradients of the raw parameters."""
    D, C, P, token, state, weight, _ = sizes
    kernel = Step(2 * C * state + 3 * D * token + 8 * P, 3 * C * state + 2 * P * C * weight / block, 4 * C * P)
    return [kernel, Step((4 + weight) * P), _weight_gradient(sizes), Step(4 * P)]


def _normalized(sizes: Sizes) -> list[Step]:
    return [Step(sizes.C * (sizes.state + sizes.weight))] if sizes.norm else []


def composed(sizes: Sizes) -> list[Step]:
    """Return the forward pass of the composed backend."""
    D, C, P, token, _, weight, _ = sizes
    return [*_normalized(sizes), _product(C, P, weight), Step(P * weight + 2 * D * token)]


def composed_backward(sizes: Sizes) -> list[Step]:
    """Return the backward pass of the composed backend, which computes the raw parameters again."""
    D, C, P, token, state, weight, norm = sizes
    affine = Step(2 * P * weight + 4 * D * token)
    steps = [*_normalized(sizes), _product(C, P, weight), affine, _product(P, C, weight), _weight_gradient(sizes)]
    return [*steps, Step(P * weight), *([Step(C * (2 * state + weight))] if norm else [])]


def fastest(sizes: Sizes, dtype: torch.dtype, chip: str, backward: bool = False) -> str:
    """Return the backend to try first for weights of `dtype`."""
    if sizes.D > WIDEST:
        return "composed"
    block = config(sizes.D, dtype, chip)["BLOCK_T"]
    kernels, ops = (fused_backward, composed_backward) if backward else (fused, composed)
    by_kernels, by_ops = seconds(kernels(sizes, block), sizes.weight), seconds(ops(sizes), sizes.weight)
    return "composed" if by_kernels > MARGIN * by_ops else "triton"


def _chosen(backward: bool, x, h, weight, bias, norm_weight, *options) -> str | None:
    if not x.is_cuda:
        return None
    widths = (t.element_size() for t in (x, h, weight))
    sizes = Sizes(x.shape[2], h.shape[2], weight.shape[0], *widths, norm_weight is not None)
    return fastest(sizes, weight.dtype, chip_of(x.device), backward)


def preferred(*args) -> str | None:
    """Return the backend of `flow_head` to try first, or None."""
    return _chosen(False, *args)


def preferred_backward(grads, outputs, *args) -> str | None:
    """Return the backend of `flow_head_backward` to try first, or None."""
    return _chosen(True, *args)


def here() -> dict[str, str]:
    """Describe the choice on this machine."""
    return {} if runtime.interpreted() or runtime.unavailable() else {"composed": DESCRIPTION}
