"""Images to tokens and back, and the rotary positions of a token grid."""

from __future__ import annotations

import math

import torch

ROTARY_BASE = 10000.0
TEXT_ANGLES = 8


def patchify(images: torch.Tensor, patch: int, order: str) -> torch.Tensor:
    """(B, C, H, W) images to (B, T, D) row-major tokens.

    The features of a token run (C, row, column) for order "chw" and (row, column, C) for "hwc".
    """
    B, C, H, W = images.shape
    if H % patch or W % patch:
        raise ValueError(f"images of {H}x{W} pixels do not divide into patches of {patch}x{patch}")
    x = images.reshape(B, C, H // patch, patch, W // patch, patch)
    x = x.permute(0, 2, 4, 1, 3, 5) if order == "chw" else x.permute(0, 2, 4, 3, 5, 1)
    return x.reshape(B, (H // patch) * (W // patch), C * patch * patch)


def unpatchify(tokens: torch.Tensor, grid: tuple[int, int], patch: int, order: str) -> torch.Tensor:
    """Inverse of `patchify` for a grid of (rows, columns) tokens."""
    B, h, w = tokens.shape[0], *grid
    if order == "chw":
        x = tokens.reshape(B, h, w, -1, patch, patch).permute(0, 3, 1, 4, 2, 5)
    else:
        x = tokens.reshape(B, h, w, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(B, -1, h * patch, w * patch)


def rotary_angles(
    grid: tuple[int, int], head_dim: int, size: int, text_len: int = 0, text_axis: bool = False
) -> torch.Tensor:
    """Rotary angles (text_len + rows * columns, head_dim / 2), float64 (arXiv 2506.06276, released code).

    An image token at (row, column) has positions scaled by size / sqrt(rows * columns), so that other resolutions span
    the range of pretraining; text token l stands at l * size / text_len on an axis of its own. With that axis 8 angles
    of a head (a quarter of a small one) are the text's; the rest is shared evenly by rows and columns.
    """
    half = head_dim // 2
    text_angles = min(TEXT_ANGLES, half // 4) if text_axis else 0
    axis_angles = (half - text_angles) // 2
    text_angles = half - 2 * axis_angles
    rows, columns = grid
    unit = size / math.sqrt(rows * columns)
    row, column = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) * unit for n in grid), indexing="ij")
    position = torch.zeros(text_len + rows * columns, 3, dtype=torch.float64)
    position[text_len:, 0], position[text_len:, 1] = row.flatten(), column.flatten()
    if text_len:
        position[:text_len, 2] = torch.arange(text_len, dtype=torch.float64) * (size / text_len)
    axis, text = (
        ROTARY_BASE ** -(torch.arange(n, dtype=torch.float64) / max(n, 1)) for n in (axis_angles, text_angles)
    )
    return torch.cat([position[:, :1] * axis, position[:, 1:2] * axis, position[:, 2:] * text], dim=1)
