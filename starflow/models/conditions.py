"""Class and text conditions of the blocks of a flow, with and without guidance."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..errors import ConfigError
from .config import FlowConfig
from .guidance import Guidance


class BlockCondition(NamedTuple):
    """Condition of a block: (class weights, text states), each None if it has none, and whether guidance acts on it.

    A guided block has 2B rows, first the B rows with the condition.
    """

    context: tuple[torch.Tensor | None, torch.Tensor | None]
    guided: bool


def check_conditions(config: FlowConfig, labels: torch.Tensor | None, text: torch.Tensor | None, rows: int) -> None:
    """Raise ValueError unless classes and text states fit the model and a batch of `rows`."""
    for name, value, expected in (("labels", labels, config.num_classes), ("text", text, config.text_dim)):
        if value is not None and not expected:
            raise ValueError(f"{name}: given, but the model has no such condition")
    if labels is not None and not (_is_tensor(labels, (rows,)) and labels.dtype == torch.int64):
        raise ValueError(f"labels: expected torch.int64 {(rows,)}, got {_describe(labels)}")
    if config.text_dim and not _is_tensor(text, states := (rows, config.text_len, config.text_dim)):
        raise ValueError(f"text: expected states {states}, got {_describe(text)}")
    if labels is not None and not torch.compiler.is_compiling():
        low, high = labels.aminmax()
        if low < -1 or high >= config.num_classes:
            raise ValueError(f"labels: expected -1 (no class) .. {config.num_classes - 1}, got {labels.tolist()}")


def _is_tensor(value: torch.Tensor | None, shape: tuple[int, ...]) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == shape


def _describe(value: torch.Tensor | None) -> str:
    """Return dtype and shape of a tensor, or the type of another value."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


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


def class_weights(config: FlowConfig, labels: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    """Weights (B, num_classes) of the class embeddings: one for the class, or equal weights for no class.

    Args:
        config: configuration of the flow.
        labels: (B,) int64 classes, -1 for no class.
        like: (B, ...) tensor with the dtype and device of the result.
    """
    classes = config.num_classes
    if not classes:
        return None
    mean = like.new_full((len(like), classes), 1 / classes)
    if labels is None:
        return mean
    one = torch.nn.functional.one_hot(labels.clamp(min=0), classes).to(mean.dtype)
    return torch.where(labels.unsqueeze(1) < 0, mean, one)


def _branches(condition: torch.Tensor | None, none: torch.Tensor | None) -> torch.Tensor | None:
    """Rows with the condition and then the same rows without."""
    return None if condition is None or none is None else torch.cat([condition, none])
