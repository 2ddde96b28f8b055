"""Class and text conditions of the blocks of a flow, with and without guidance."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from starflow_kernels._core.torch_private import is_intercepted

from ..errors import ConfigError
from .config import FlowConfig, StackConfig
from .guidance import Guidance


class BlockCondition(NamedTuple):
    """Condition of a block: (class weights, text states), each None if it has none, and whether guidance acts on it.

    A guided block has 2B rows, first the B rows with the condition.
    """

    context: tuple[torch.Tensor | None, torch.Tensor | None]
    guided: bool


Labels = torch.Tensor | np.ndarray | Sequence[int]
# Largest integer of int64.
LARGEST = 2**63 - 1


def integers(values: Labels | int) -> torch.Tensor | None:
    """Return integers of any kind, in a tensor, an array or a sequence, as int64; None for floats, bools and others.

    A sequence of no values has no kind, and is taken.
    """
    if isinstance(values, torch.Tensor):
        refused = values.is_floating_point() or values.is_complex() or values.dtype == torch.bool
        integer = values.to(torch.int64)
        if values.dtype == torch.uint64:
            # What int64 cannot hold must not become a class, or -1.
            integer = torch.where(integer < 0, LARGEST, integer)
        return None if refused else integer
    if torch.compiler.is_compiling():
        # Dynamo does not trace the attributes of an array.
        return integers(torch.as_tensor(values, dtype=None, device="cpu"))
    try:
        array = np.asarray(values)
    except (TypeError, ValueError):
        return None
    # numpy turns bools among integers into integers.
    mixed = isinstance(values, (list, tuple)) and any(isinstance(value, (bool, np.bool_)) for value in values)
    if array.dtype.kind == "u":
        array = np.asarray(np.minimum(array, np.uint64(LARGEST)))
    empty = not array.size and not isinstance(values, np.ndarray)
    refused = mixed or not (empty or array.dtype.kind in "iu")
    return None if refused else torch.from_numpy(array.astype(np.int64))


def check_labels(name: str, labels: Labels, classes: int, rows: int, device: torch.device) -> torch.Tensor:
    """Return classes as int64 on a device, or raise ValueError.

    Args:
        name: name of the argument, for the message.
        labels: (rows,) integers from -1, no class, to classes - 1.
        classes: number of classes.
        rows: number of samples.
        device: the device.
    """
    found = integers(labels)
    if found is None or found.shape != (rows,):
        raise ValueError(f"{name}: expected integers of shape {(rows,)}, got {_describe(labels)}")
    if rows and not (found.is_meta or is_intercepted()):
        low, high = found.aminmax()
        if low < -1 or high >= classes:
            raise ValueError(f"{name}: expected -1 (no class) .. {classes - 1}, got {found.tolist()}")
    return found.to(device)


def check_conditions(
    config: FlowConfig, labels: Labels | None, text: torch.Tensor | None, like: torch.Tensor
) -> torch.Tensor | None:
    """Return the classes as int64 on the device of `like` (B, ...).

    Raises:
        ValueError: classes or text states do not fit the model and the batch.
    """
    rows = like.shape[0]
    for name, value, expected in (("labels", labels, config.num_classes), ("text", text, config.text_dim)):
        if value is not None and not expected:
            raise ValueError(f"{name}: given, but the model has no such condition")
    if config.text_dim and not _is_tensor(text, states := (rows, config.text_len, config.text_dim)):
        raise ValueError(f"text: expected states {states}, got {_describe(text)}")
    return None if labels is None else check_labels("labels", labels, config.num_classes, rows, like.device)


def _is_tensor(value: torch.Tensor | None, shape: tuple[int, ...]) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == shape


def _describe(value: object) -> str:
    """Return dtype and shape of a tensor or array, or the type and values of a short sequence."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f"{value.dtype} {tuple(value.shape)}"
    return f"{type(value).__name__} {reprlib.repr(value)}"


def block_conditions(
    config: FlowConfig,
    labels: torch.Tensor | None,
    text: torch.Tensor | None,
    like: torch.Tensor,
    guidance: Guidance,
    empty_text: torch.Tensor | None,
) -> list[BlockCondition]:
    """Return the condition of each block, see `Flow.contexts`."""
    classes, conditional = class_weights(config, labels, like), labels is not None or text is not None
    plain = guided = classes, text
    if guidance.weight:
        if not conditional and guidance.temperature == 1:
            raise ConfigError("guidance: needs labels, text, or an attention temperature other than 1")
        guided = _branches(classes, class_weights(config, None, like)), None
        if text is not None:
            if empty_text is None:
                raise ConfigError("guidance: text needs empty_text, the states of the empty prompt")
            guided = guided[0], _branches(text, empty_text.expand_as(text))
    conditions = []
    for i in range(len(config.layers)):
        reached = config.conditioned(i)
        acts = bool(guidance.weight) and (reached or not conditional)
        conditions.append(BlockCondition((guided if acts else plain) if reached else (None, None), acts))
    return conditions


def class_weights(config: StackConfig, labels: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    """Weights (B, num_classes) of the class embeddings: one for the class, or equal weights for no class.

    Args:
        config: configuration of the flow.
        labels: (B,) int64 classes, -1 for no class. A class out of range gives NaN.
        like: (B, ...) tensor with the dtype and device of the result.
    """
    classes = config.num_classes
    if not classes:
        return None
    mean = like.new_full((like.shape[0], classes), 1 / classes)
    if labels is None:
        return mean
    labels = labels.unsqueeze(1)
    one = labels == torch.arange(classes, dtype=labels.dtype, device=labels.device)
    weights = torch.where(labels < 0, mean, one.to(mean.dtype))
    if is_intercepted():
        # `check_labels` could not read the values.
        weights = weights.masked_fill((labels < -1) | (labels >= classes), math.nan)
    return weights


def _branches(condition: torch.Tensor | None, none: torch.Tensor | None) -> torch.Tensor | None:
    """Rows with the condition and then the same rows without."""
    return None if condition is None or none is None else torch.cat([condition, none])
