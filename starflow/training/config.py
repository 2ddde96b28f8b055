"""Settings that all trainers share."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import yaml

from ..errors import ConfigError
from ..io.files import write_text
from ..seeds import MAX_SEED
from ..settings import check_types, read_sections, section

MAX_WORKERS = 1024
SETTINGS = "settings.yaml"


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """Settings of the training loop.

    Args:
        steps: number of optimizer steps.
        batch_size: images per step; a data set with fewer images gives all of them, with a warning.
        learning_rate: largest learning rate. It rises linearly over `warmup_steps`, then falls along a cosine.
        min_learning_rate: learning rate at the end.
        warmup_steps: number of steps with a rising learning rate.
        weight_decay: weight decay of AdamW.
        beta1: decay of the first moment of AdamW.
        beta2: decay of the second moment of AdamW.
        clip: largest gradient norm; 0 turns clipping off.
        bf16: whether to autocast the networks to bfloat16.
        seed: seed of all random numbers.
        workers: processes that read images.
        sample_every: steps between sample grids; 0 writes none.
        checkpoint_every: steps between checkpoints; 0 writes one at the end only.
        log_every: steps between entries of the metrics; 0 writes the last step only.
        keep_checkpoints: number of checkpoints to keep.
        spike_factor: a step whose gradient norm exceeds this many times its running average is skipped; 0 skips none.
        max_skips: steps in a row that may be skipped, because of a spike or of a loss or gradient that is not finite.
            One more ends the run.
    """

    steps: int
    batch_size: int
    learning_rate: float = 1e-4
    min_learning_rate: float = 1e-6
    warmup_steps: int = 0
    weight_decay: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    bf16: bool = False
    seed: int = 0
    workers: int = 0
    sample_every: int = 1000
    checkpoint_every: int = 1000
    log_every: int = 50
    keep_checkpoints: int = 1
    spike_factor: float = 0.0
    max_skips: int = 5

    RANGES: ClassVar[dict[str, tuple[float, float]]] = {
        "steps": (1, math.inf),
        "batch_size": (1, math.inf),
        "seed": (0, MAX_SEED + 1),
        "workers": (0, MAX_WORKERS + 1),
        "keep_checkpoints": (1, math.inf),
        "beta1": (0, 1),
        "beta2": (0, 1),
    }

    def __post_init__(self):
        check_types(self)
        for field in dataclasses.fields(self):
            value, (low, high) = getattr(self, field.name), self.RANGES.get(field.name, (0, math.inf))
            if not isinstance(value, str) and not low <= value < high:
                raise ConfigError(f"{field.name}={value} is not in [{low}, {high})")

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.min_learning_rate + (self.learning_rate - self.min_learning_rate) * cosine


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Base of the settings that determine a run, with a frozen dataclass per section, such as `data` and `training`."""

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> RunConfig:
        """Read nested mappings.

        Args:
            settings: a mapping per section, as `to_dict` gives.

        Raises:
            ConfigError: a setting is unknown, missing or out of range.
        """
        kinds = typing.get_type_hints(cls)
        readers = {field.name: _reader(kinds[field.name]) for field in dataclasses.fields(cls)}
        return cls(**read_sections(settings, readers))

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain mappings."""
        return dataclasses.asdict(self)

    def save(self, folder: Path) -> None:
        """Write the settings into a folder."""
        write_text(folder / SETTINGS, yaml.safe_dump(self.to_dict(), sort_keys=False))


def _reader(kind: type) -> Callable[[dict[str, Any]], Any]:
    return getattr(kind, "from_dict", None) or section(kind)
