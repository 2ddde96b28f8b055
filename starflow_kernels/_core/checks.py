"""Argument checks of the public functions. An error names the argument, the given value and what is accepted."""

from __future__ import annotations

import math
import numbers

import torch

from .compiled import native_unavailable

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(name: str, value: object, shape: tuple[int | str, ...], like: torch.Tensor | None = None) -> None:
    """Check that `value` is a floating tensor of `shape` on the device of `like`.

    Args:
        name: name of the argument, for the error.
        value: the argument.
        shape: expected sizes. A string stands for any size of at least 1; "B" also accepts 0.
        like: tensor on the expected device; None accepts every device.

    Raises:
        TypeError: not a tensor, or not of a floating dtype.
        ValueError: another shape or device.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor of shape {format_shape(shape)}, got {type(value).__name__}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name}: dtype {value.dtype} is not one of {', '.join(map(str, FLOATS))}")
    fits = (s == "B" or n > 0 if isinstance(s, str) else s == n for s, n in zip(shape, value.shape))
    if value.shape != shape and (value.ndim != len(shape) or not all(fits)):
        raise ValueError(f"{name}: expected shape {format_shape(shape)}, got {format_shape(tuple(value.shape))}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name}: on {value.device}, expected {like.device}")


def check_same_dtype(like: str, tensors: dict[str, torch.Tensor | None]) -> None:
    """Raise TypeError unless every tensor that is not None has the dtype of `tensors[like]`."""
    dtype = tensors[like].dtype
    for name, value in tensors.items():
        if value is not None and value.dtype != dtype:
            raise TypeError(f"{name}: dtype {value.dtype}, expected that of {like}, {dtype}")


class NonFiniteError(ValueError):
    """Error of an inverse with an input or a result that is not finite."""


def check_finite(**inputs: torch.Tensor | None) -> None:
    """Raise NonFiniteError if an input of a sampler holds NaN or infinity."""
    for name, value in inputs.items():
        if value is None or not value.numel():
            continue
        if value.is_meta:
            raise ValueError(f"{name}: on meta, a device without values")
        if not all_finite(value):
            bad = int((~value.isfinite()).sum())
            raise NonFiniteError(f"{name}: {bad} of {value.numel()} values are not finite")


def all_finite(value: torch.Tensor) -> bool:
    """Return whether all values of a tensor are finite."""
    if type(value) is torch.Tensor and value.dtype == torch.float32 and value.is_cpu and not native_unavailable():
        return torch.ops.starflow_native.all_finite(value.contiguous())
    # A finite sum, the fastest pass over memory, has finite terms; finite terms may have an infinite sum.
    return math.isfinite(value.sum().item()) or bool(value.isfinite().all())


def check_range(name: str, value: float, low: float) -> None:
    """Raise ValueError unless low < value < infinity."""
    if not low < value < float("inf"):
        raise ValueError(f"{name}={value}: expected a finite number > {low:g}")


def check_guidance(value: object, rows: int, tokens: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the guidance weights as a (rows, tokens) tensor, or raise TypeError or ValueError."""
    truth = isinstance(value, bool) or (isinstance(value, torch.Tensor) and value.dtype == torch.bool)
    if truth or not isinstance(value, (numbers.Real, torch.Tensor)):
        raise TypeError(f"guidance: expected a number or a tensor, got {type(value).__name__}")
    weight = torch.as_tensor(value, dtype=dtype, device=device)
    try:
        return weight.expand(rows, tokens)
    except RuntimeError:
        raise ValueError(f"guidance: shape {tuple(weight.shape)} does not broadcast to ({rows}, {tokens})") from None


def format_shape(shape: tuple) -> str:
    """Return a shape as it stands in errors."""
    return "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"
