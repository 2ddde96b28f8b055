"""The loop that trainers share: a run in a folder that is resumed at the bit.

A step is a function of the settings, its number and the state that `state` gives, so that a resumed run repeats an
uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..data import datasets
from ..errors import CheckpointError, ConfigError, StarflowError
from ..io.files import write_atomically, write_text

STATE = "training.pt"
METRICS = "metrics.jsonl"
SETTINGS = "settings.yaml"


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """Settings of a loop.

    steps, batch_size: of the optimiser. learning_rate rises linearly over warmup_steps, then falls to
    min_learning_rate along a cosine. weight_decay, beta1, beta2: of AdamW. clip: largest gradient norm, 0 for none.
    workers: processes that read images. sample_every, checkpoint_every, log_every: in steps, 0 for never.
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
    seed: int = 0
    workers: int = 0
    sample_every: int = 1000
    checkpoint_every: int = 1000
    log_every: int = 50

    RANGES: ClassVar[dict[str, tuple[float, float]]] = {
        "steps": (1, math.inf),
        "batch_size": (1, math.inf),
        "beta1": (0, 1),
        "beta2": (0, 1),
        "ema": (0, 1),
        "dropout": (0, 1),
        "label_drop": (0, 1.0001),
    }

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, (low, high) = getattr(self, field.name), self.RANGES.get(field.name, (0, math.inf))
            kind = {"int": int, "bool": bool}.get(field.type, (int, float))
            if not isinstance(value, kind) or isinstance(value, bool) != (field.type == "bool"):
                raise ConfigError(f"training: {field.name}={value!r} is not of type {field.type}")
            if not low <= value < high:
                raise ConfigError(f"training: {field.name}={value} is not in [{low}, {high})")

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.min_learning_rate + (self.learning_rate - self.min_learning_rate) * cosine


class Loop:
    """A run in a folder: settings, weights, checkpoint, metrics and sample grids.

    A trainer gives CONFIG, the type of its settings (with the fields `data` and `training`, `from_dict` and `to_dict`),
    and the methods from `train_step` on.
    """

    CONFIG: ClassVar[Any]
    COMMAND: ClassVar[str]

    def __init__(self, config: Any, folder: Path, device: str = "cpu", tensorboard: bool = False):
        self.config, self.folder, self.device = config, Path(folder), device
        self.images, _ = datasets.load(config.data)
        if not len(self.images):
            raise ConfigError("data: no images are left for training")
        self.step = 0
        self.metrics: list[dict[str, float]] = []
        self.writer = _tensorboard(self.folder) if tensorboard else None

    @classmethod
    def resume(cls, folder: Path, device: str = "cpu", tensorboard: bool = False) -> Loop:
        """Trainer at the last checkpoint in a run's folder; CheckpointError when there is none or it is damaged."""
        path = Path(folder) / STATE
        if not path.exists():
            raise CheckpointError(f"nothing to resume: no {path}")
        try:
            state = torch.load(path, map_location=device, weights_only=True)
            trainer = cls(cls.CONFIG.from_dict(state["config"]), folder, device, tensorboard)
            trainer.load_state(state, path)
            trainer.step, trainer.metrics = state["step"], state["metrics"]
        except (RuntimeError, EOFError, KeyError, OSError, pickle.UnpicklingError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged: {error}".splitlines()[0]) from None
        return trainer

    def run(self, quiet: bool = False) -> None:
        """Train to the last step; a KeyboardInterrupt leaves a checkpoint behind."""
        training = self.config.training
        bar = tqdm(total=training.steps, initial=self.step, disable=quiet or None, unit="step", smoothing=0.05)
        try:
            order = datasets.ShuffledBatches(
                len(self.images), training.batch_size, training.seed, self.step, training.steps
            )
            for batch in DataLoader(self.images, batch_sampler=order, num_workers=training.workers):
                metrics = self.train_step(*batch)
                bar.update()
                last = self.step == training.steps
                if last or (training.log_every and self.step % training.log_every == 0):
                    self.log(metrics, bar)
                if training.sample_every and (last or self.step % training.sample_every == 0):
                    self.save_samples()
                if last or (training.checkpoint_every and self.step % training.checkpoint_every == 0):
                    self.save()
        except KeyboardInterrupt:
            self.save()
            raise
        finally:
            bar.close()
            if self.writer:
                self.writer.close()

    def log(self, metrics: dict[str, float], bar: tqdm) -> None:
        """Append to metrics.jsonl, the progress bar and TensorBoard."""
        self.metrics.append(metrics)
        bar.set_postfix({name: f"{value:.4f}" for name, value in list(metrics.items())[1:3]})
        if self.writer:
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, self.step)

    def save(self) -> None:
        """Write weights, settings, metrics and the state that `resume` reads, each atomically, the state last."""
        self.save_weights()
        write_text(self.folder / SETTINGS, yaml.safe_dump(self.config.to_dict(), sort_keys=False))
        write_text(self.folder / METRICS, "".join(json.dumps(m) + "\n" for m in self.metrics))
        state = {"config": self.config.to_dict(), "step": self.step, "metrics": self.metrics, **self.state()}
        write_atomically(self.folder / STATE, lambda path: torch.save(state, path))

    def set_learning_rate(self, *optimizers: torch.optim.Optimizer) -> float:
        """Learning rate of the present step, set in the optimisers."""
        rate = self.config.training.learning_rate_at(self.step)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        return rate

    def check_finite(self, loss: torch.Tensor) -> None:
        """Raise StarflowError when training has diverged."""
        if not torch.isfinite(loss):
            raise StarflowError(
                f"the loss is {loss.item()} at step {self.step}: nothing was saved since the last checkpoint; "
                f"lower training.learning_rate"
            )

    def train_step(self, *batch: torch.Tensor) -> dict[str, float]:
        """One step of the optimiser; its random numbers belong to the step's number. Counts the step."""
        raise NotImplementedError

    def save_samples(self) -> None:
        """Write a grid that shows what was learned."""
        raise NotImplementedError

    def save_weights(self) -> None:
        """Write the weights for those who use them."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """What a resumed run needs beside settings, step and metrics."""
        raise NotImplementedError

    def load_state(self, state: dict[str, Any], source: Path) -> None:
        """Take back what `state` gave."""
        raise NotImplementedError


def _tensorboard(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "--tensorboard needs the package tensorboard: pip install starflow-kernels[logging]"
        ) from None
    return SummaryWriter(str(folder / "tensorboard"))
