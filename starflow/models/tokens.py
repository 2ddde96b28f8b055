"""Tokens of images, and the rotary positions of a grid of tokens."""

from __future__ import annotations

import functools
import math

import torch

from starflow_kernels._core.implicit import needs_gradient
from starflow_kernels._core.torch_private import is_intercepted

ROTARY_BASE = 10000.0
TEXT_ANGLES = 8


def patchify(images: torch.Tensor, patch: int, order: str) -> torch.Tensor:
    """Split images into tokens, row by row.

    Args:
        images: (B, C, H, W) images.
        patch: side of a token in pixels.
        order: order of the values of a token: "chw" is (C, row, column), "hwc" is (row, column, C).

    Returns:
        (B, T, D) tokens.
    """
    B, C, H, W = images.shape
    if H % patch or W % patch:
        raise ValueError(f"images of {H}x{W} pixels do not divide into patches of {patch}x{patch}")
    x = images.reshape(B, C, H // patch, patch, W // patch, patch)
    x = x.permute(0, 2, 4, 1, 3, 5) if order == "chw" else x.permute(0, 2, 4, 3, 5, 1)
    return _reshaped(x, (B, (H // patch) * (W // patch), C * patch * patch))


def unpatchify(tokens: torch.Tensor, grid: tuple[int, int], patch: int, order: str) -> torch.Tensor:
    """Join tokens to images: the inverse of `patchify`.

    Args:
        tokens: (B, T, D) tokens.
        grid: rows and columns of tokens.
        patch: side of a token in pixels.
        order: order of the values of a token, see `patchify`.

    Returns:
        (B, C, H, W) images.
    """
    # A batch of no images leaves no size to infer.
    B, h, w, C = tokens.shape[0], *grid, tokens.shape[2] // patch**2
    if order == "chw":
        x = tokens.reshape(B, h, w, C, patch, patch).permute(0, 3, 1, 4, 2, 5)
    else:
        x = tokens.reshape(B, h, w, patch, patch, C).permute(0, 5, 1, 3, 2, 4)
    return _reshaped(x, (B, C, h * patch, w * patch))


def _reshaped(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return x.reshape(shape).

    On the CPU, one thread copies: those of torch spin for milliseconds afterwards, on cores that a solve needs.
    """
    plain = type(x) is torch.Tensor and x.dtype == torch.float32 and x.device.type == "cpu"
    if not plain or is_intercepted() or needs_gradient(x):
        return x.reshape(shape)
    return torch.from_numpy(x.numpy(force=True).reshape(shape))


def rotary_angles(
    grid: tuple[int, int], head_dim: int, size: int, text_len: int = 0, text_axis: bool = False
) -> torch.Tensor:
    """Compute rotary angles (arXiv 2506.06276, upstream code).

    The positions of image tokens are scaled by size / sqrt(rows * columns), so that every resolution spans the range
    of pretraining. Text token l has the position l * size / text_len on a separate axis. Rows and columns share the
    angles of a head evenly; a text axis takes 8 of them, or a quarter in a small head.

    Args:
        grid: rows and columns of image tokens.
        head_dim: width of an attention head.
        size: side in tokens at which positions are not scaled.
        text_len: number of text tokens in front of the image tokens.
        text_axis: whether some angles belong to a text axis.

    Returns:
        (text_len + rows * columns, head_dim / 2) float64 angles.
    """
    half = head_dim // 2
    text_angles = min(TEXT_ANGLES, half // 4) if text_axis else 0
    axis_angles = (half - text_angles) // 2
    text_angles = half - 2 * axis_angles
    rows, columns = grid
    unit = size / math.sqrt(rows * columns)
    row, column = torch.meshgrid(
        *(torch.arange(n, dtype=torch.float64, device="cpu") * unit for n in grid), indexing="ij"
    )
    position = torch.zeros(text_len + rows * columns, 3, dtype=torch.float64, device="cpu")
    position[text_len:, 0], position[text_len:, 1] = row.flatten(), column.flatten()
    if text_len:
        position[:text_len, 2] = torch.arange(text_len, dtype=torch.float64, device="cpu") * (size / text_len)
    axis, text = (
        ROTARY_BASE ** -(torch.arange(n, dtype=torch.float64, device="cpu") / max(n, 1))
        for n in (axis_angles, text_angles)
    )
    return torch.cat([position[:, :1] * axis, position[:, 1:2] * axis, position[:, 2:] * text], dim=1)


def rotary_table(key: tuple, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of rotary angles; recent results are kept.

    Args:
        key: arguments of `rotary_angles`.
        dtype: dtype of the result.
        device: device of the result.
    """
    # A compiler cannot trace a cache, and tensors made inside a mode or transform are of no use outside it.
    return (_rotary_table if is_intercepted() else _cached_table)(key, dtype, device)


def _rotary_table(key: tuple, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    angles = rotary_angles(*key)
    return angles.cos().to(dtype=dtype, device=device), angles.sin().to(dtype=dtype, device=device)


@functools.lru_cache(maxsize=32)
def _cached_table(key: tuple, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    # A table made in inference mode could not be used in training later.
    with torch.inference_mode(False), torch.no_grad():
        return _rotary_table(key, dtype, device)
