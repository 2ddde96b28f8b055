"""Rotary positions in Triton. A head is read as two tiles: the first and the second values of all rotated pairs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def block_head_row(blocks, heads):
    """Return the indices of this program's block of tokens, head and batch row."""
    head = tl.program_id(0) // blocks
    return tl.program_id(0) % blocks, (head % heads).to(tl.int64), (head // heads).to(tl.int64)


@triton.jit
def row_pointers(x, stride, start, T, width, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    """Return pointers to the `width` values of BLOCK tokens from `start` on, and the mask of existing values."""
    token, i = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    # (BLOCK, BLOCK_D)
    pointers = x + tl.cast(start, tl.int64) * stride + (token[:, None] * stride + i[None, :])
    return pointers, (start + token < T)[:, None] & (i < width)[None, :]


@triton.jit
def load_rows(x, stride, start, T, width, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    """Return the values of BLOCK tokens from `start` on, zero past T and `width`."""
    pointers, mask = row_pointers(x, stride, start, T, width, BLOCK_D, BLOCK)
    return tl.load(pointers, mask, 0)  # (BLOCK, BLOCK_D)


@triton.jit
def load_pair(
    x, stride, cos, sin, start, T,
    HEAD: tl.constexpr, HALF: tl.constexpr, ROTARY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the first and the second values of all pairs of BLOCK tokens, rotated; zero past T and past the head."""
    if ROTARY == "interleaved":
        both = load_rows(x, stride, start, T, HEAD, 2 * HALF, BLOCK)  # (BLOCK, 2 HALF)
        first, second = tl.split(tl.reshape(both, [BLOCK, HALF, 2]))
    else:
        first = load_rows(x, stride, start, T, HEAD - HEAD // 2, HALF, BLOCK)  # (BLOCK, HALF)
        second = load_rows(x + (HEAD - HEAD // 2), stride, start, T, HEAD // 2, HALF, BLOCK)  # (BLOCK, HALF)
    if ROTARY != "none":
        c = load_rows(cos, HEAD // 2, start, T, HEAD // 2, HALF, BLOCK)  # (BLOCK, HALF)
        s = load_rows(sin, HEAD // 2, start, T, HEAD // 2, HALF, BLOCK)  # (BLOCK, HALF)
        a, b = first.to(tl.float32), second.to(tl.float32)
        first, second = (a * c - b * s).to(first.dtype), (b * c + a * s).to(second.dtype)
    return first, second


@triton.jit
def store_pair(
    x, stride, cos, sin, start, T, first, second,
    HEAD: tl.constexpr, HALF: tl.constexpr, ROTARY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Undo the rotation of BLOCK tokens and store them."""
    if ROTARY != "none":
        c = load_rows(cos, HEAD // 2, start, T, HEAD // 2, HALF, BLOCK)  # (BLOCK, HALF)
        s = load_rows(sin, HEAD // 2, start, T, HEAD // 2, HALF, BLOCK)  # (BLOCK, HALF)
        first, second = first * c + second * s, second * c - first * s
    if ROTARY == "interleaved":
        pointers, mask = row_pointers(x, stride, start, T, HEAD, 2 * HALF, BLOCK)
        tl.store(pointers, tl.reshape(tl.join(first, second), [BLOCK, 2 * HALF]), mask)
    else:
        pointers, mask = row_pointers(x, stride, start, T, HEAD - HEAD // 2, HALF, BLOCK)
        tl.store(pointers, first, mask)
        pointers, mask = row_pointers(x + (HEAD - HEAD // 2), stride, start, T, HEAD // 2, HALF, BLOCK)
        tl.store(pointers, second, mask)


@triton.jit(do_not_specialize=("H",))
def apply_rotary_kernel(
    x, cos, sin, rotated, T, H, q_row, q_token, q_head,
    HEAD: tl.constexpr, HALF: tl.constexpr, ROTARY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotate BLOCK tokens of one head; store the first values of all pairs before the second values."""
    block, head, row = block_head_row(tl.cdiv(T, BLOCK), H)
    start = block * BLOCK
    source = x + row * q_row + head * q_head
    first, second = load_pair(source, q_token, cos, sin, start, T, HEAD, HALF, ROTARY, BLOCK)  # (BLOCK, HALF) each
    target = rotated + (row * T * H + head) * HEAD
    store_pair(target, H * HEAD, cos, sin, start, T, first, second, HEAD, HALF, "none", BLOCK)


@triton.jit(do_not_specialize=("H",))
def undo_rotary_kernel(
    rotated, cos, sin, x, T, H,
    HEAD: tl.constexpr, HALF: tl.constexpr, ROTARY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Undo apply_rotary_kernel; both tensors are contiguous."""
    block, head, row = block_head_row(tl.cdiv(T, BLOCK), H)
    start, offset = block * BLOCK, (row * T * H + head) * HEAD
    # (BLOCK, HALF) each
    first, second = load_pair(rotated + offset, H * HEAD, cos, sin, start, T, HEAD, HALF, "none", BLOCK)
    first, second = first.to(tl.float32), second.to(tl.float32)
    store_pair(x + offset, H * HEAD, cos, sin, start, T, first, second, HEAD, HALF, ROTARY, BLOCK)


def half_tile(d: int) -> int:
    """Return the padded size of half a head of d values."""
    return max(16, triton.next_power_of_2(triton.cdiv(d, 2)))


def strides(*tensors: torch.Tensor) -> list[int]:
    """Return the strides of rows, tokens and heads of each tensor (B, T, H, d)."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def angles(cos: torch.Tensor | None, sin: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Return cos and sin in float32, contiguous."""
    return [None if t is None else t.to(torch.float32).contiguous() for t in (cos, sin)]


def apply_rotary(x: torch.Tensor, cos, sin, rotary: str) -> torch.Tensor:
    """Return x (B, T, H, d) rotated, the first values of all pairs before the second; x itself if rotary is "none"."""
    if rotary == "none":
        return x
    (B, T, H, d), rotated = x.shape, x.new_empty(x.shape)
    if B:
        apply_rotary_kernel[(B * H * triton.cdiv(T, 64),)](
            x, cos, sin, rotated, T, H, *strides(x), HEAD=d, HALF=half_tile(d), ROTARY=rotary, BLOCK=64
        )
    return rotated


def undo_rotary(rotated: torch.Tensor, cos, sin, rotary: str) -> torch.Tensor:
    """Return x from the result (B, T, H, d) of `apply_rotary`."""
    if rotary == "none":
        return rotated
    (B, T, H, d), x = rotated.shape, rotated.new_empty(rotated.shape)
    if B:
        undo_rotary_kernel[(B * H * triton.cdiv(T, 64),)](
            rotated.contiguous(), cos, sin, x, T, H, HEAD=d, HALF=half_tile(d), ROTARY=rotary, BLOCK=64
        )
    return x
