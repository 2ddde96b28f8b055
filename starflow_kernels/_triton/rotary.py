"""Rotary positions in Triton: heads as two tiles, the first and the second value of every pair that is turned."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def place(blocks, heads):
    """Block, head and row of a program."""
    head = tl.program_id(0) // blocks
    return tl.program_id(0) % blocks, (head % heads).to(tl.int64), (head // heads).to(tl.int64)


@triton.jit
def rows(x, stride, start, T, width, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    """Where the `width` values of tokens from `start` on lie, and which of the tile exist."""
    token, i = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    at = x + tl.cast(start, tl.int64) * stride + (token[:, None] * stride + i[None, :])
    return at, (start + token < T)[:, None] & (i < width)[None, :]


@triton.jit
def load_rows(x, stride, start, T, width, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    """The values of BLOCK tokens; zero past T and `width`."""
    at, inside = rows(x, stride, start, T, width, BLOCK_D, BLOCK)
    return tl.load(at, inside, 0)


@triton.jit
def load_pair(
    x, stride, cos, sin, start, T,
    HEAD: tl.constexpr, HALF: tl.constexpr, ROTARY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """First and second values of the pairs of BLOCK tokens, rotated; zero past T and past the head."""
    if ROTARY == "interleaved":
        both = load_rows(x, stride, start, T, HEAD, 2 * HALF, BLOCK)
        first, second = tl.split(tl.reshape(both, [BLOCK, HALF, 2]))
    else:
        first = load_rows(x, stride, start, T, HEAD - HEAD // 2, HALF, BLOCK)
        second = load_rows(x + (HEAD - HEAD // 2), stride, start, T, HEAD // 2, HALF, BLOCK)
    if ROTARY != "none":
        c = load_rows(cos, HEAD // 2, start, T, HEAD // 2, HALF, BLOCK)
        s = load_rows(sin, HEAD // 2, start, T, HEAD // 2, HALF, BLOCK)
        a, b = first.to(tl.float32), second.to(tl.float32)
        first, second = (a * c - b * s).to(first.dtype), (b * c + a * s).to(second.dtype)
    return first, second


@triton.jit
def store_pair(
    x, stride, cos, sin, start, T, first, second,
    HEAD: tl.constexpr, HALF: tl.constexpr, ROTARY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn gradients of rotated values back and store them."""
    if ROTARY != "none":
        c = load_rows(cos, HEAD // 2, start, T, HEAD // 2, HALF, BLOCK)
        s = load_rows(sin, HEAD // 2, start, T, HEAD // 2, HALF, BLOCK)
        first, second = first * c + second * s, second * c - first * s
    if ROTARY == "interleaved":
        at, inside = rows(x, stride, start, T, HEAD, 2 * HALF, BLOCK)
        tl.store(at, tl.reshape(tl.join(first, second), [BLOCK, 2 * HALF]), inside)
    else:
        at, inside = rows(x, stride, start, T, HEAD - HEAD // 2, HALF, BLOCK)
        tl.store(at, first, inside)
        at, inside = rows(x + (HEAD - HEAD // 2), stride, start, T, HEAD // 2, HALF, BLOCK)
        tl.store(at, second, inside)


@triton.jit
def turn_kernel(
    x, cos, sin, turned, T, H, q_row, q_token, q_head,
    HEAD: tl.constexpr, HALF: tl.constexpr, ROTARY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The rotated values of BLOCK tokens of one head, first values of all pairs before the second ones."""
    block, head, row = place(tl.cdiv(T, BLOCK), H)
    start = block * BLOCK
    at = x + row * q_row + head * q_head
    first, second = load_pair(at, q_token, cos, sin, start, T, HEAD, HALF, ROTARY, BLOCK)
    to = turned + (row * T * H + head) * HEAD
    store_pair(to, H * HEAD, cos, sin, start, T, first, second, HEAD, HALF, "none", BLOCK)


@triton.jit
def turn_back_kernel(
    turned, cos, sin, x, T, H,
    HEAD: tl.constexpr, HALF: tl.constexpr, ROTARY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The opposite of turn_kernel, contiguous to contiguous."""
    block, head, row = place(tl.cdiv(T, BLOCK), H)
    start, at = block * BLOCK, (row * T * H + head) * HEAD
    first, second = load_pair(turned + at, H * HEAD, cos, sin, start, T, HEAD, HALF, "none", BLOCK)
    first, second = first.to(tl.float32), second.to(tl.float32)
    store_pair(x + at, H * HEAD, cos, sin, start, T, first, second, HEAD, HALF, ROTARY, BLOCK)


def half_tile(d: int) -> int:
    """Padded size of half a head."""
    return max(16, triton.next_power_of_2(triton.cdiv(d, 2)))


def adjacent(x: torch.Tensor) -> torch.Tensor:
    """x (B, T, H, d) with the values of a head adjacent."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(*tensors: torch.Tensor) -> list[int]:
    """Those between rows, tokens and heads of each."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def angles(cos: torch.Tensor | None, sin: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The angles as the kernels read them."""
    return [None if t is None else t.to(torch.float32).contiguous() for t in (cos, sin)]


def turned(x: torch.Tensor, cos, sin, rotary: str) -> torch.Tensor:
    """x (B, T, H, d) rotated, first values of all pairs before the second ones; x itself without rotary positions."""
    if rotary == "none":
        return x
    (B, T, H, d), found = x.shape, x.new_empty(x.shape)
    if B:
        turn_kernel[(B * H * triton.cdiv(T, 64),)](
            x, cos, sin, found, T, H, *strides(x), HEAD=d, HALF=half_tile(d), ROTARY=rotary, BLOCK=64
        )
    return found


def turned_back(x: torch.Tensor, cos, sin, rotary: str) -> torch.Tensor:
    """x of `turned` from its result."""
    if rotary == "none":
        return x
    (B, T, H, d), found = x.shape, x.new_empty(x.shape)
    if B:
        turn_back_kernel[(B * H * triton.cdiv(T, 64),)](
            x.contiguous(), cos, sin, found, T, H, HEAD=d, HALF=half_tile(d), ROTARY=rotary, BLOCK=64
        )
    return found
