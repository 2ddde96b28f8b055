"""Training loop that all trainers share, and the settings of a run.

A step depends only on the settings, its number and the state in the checkpoint. A resumed run therefore gives the same
bits as an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import pickle
import signal
import threading
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from torch import nn
from tqdm import tqdm

from ..data.batches import ShuffledBatches, batches
from ..data.datasets import data_state, load
from ..errors import CheckpointError, ConfigError, DataError, StarflowError
from ..io.files import check_writable, write_atomically, write_text
from ..seeds import MAX_SEED, generator
from ..settings import check_types, read_sections, section

MAX_WORKERS = 1024
STATE = "training.pt"
METRICS = "metrics.jsonl"
SETTINGS = "settings.yaml"


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """Settings of the training loop.

    Args:
        steps: number of optimizer steps.
        batch_size: images per step.
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

    RANGES: ClassVar[dict[str, tuple[float, float]]] = {
        "steps": (1, math.inf),
        "batch_size": (1, math.inf),
        "seed": (0, MAX_SEED + 1),
        "workers": (0, MAX_WORKERS + 1),
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


def _reader(kind: type) -> Callable[[dict[str, Any]], Any]:
    return getattr(kind, "from_dict", None) or section(kind)


class Loop:
    """Training run in a folder, with settings, weights, checkpoint, metrics and sample grids.

    A trainer sets CONFIG and COMMAND and defines the methods from `train_step` on. Its constructor makes the modules
    and calls `add_optimizer`.

    Args:
        config: settings of the run, of the type CONFIG.
        folder: folder of the run; it is created if it does not exist.
        device: torch device that trains.
        tensorboard: whether to log to a folder `tensorboard` too.
    """

    CONFIG: ClassVar[type[RunConfig]]
    COMMAND: ClassVar[str]

    def __init__(self, config: Any, folder: Path, device: str = "cpu", tensorboard: bool = False):
        self.config, self.folder, self.device = config, Path(folder), device
        check_writable(self.folder)
        self.images, _ = load(config.data)
        if not len(self.images):
            raise ConfigError("data: no images are left for training")
        self.data_state = data_state(config.data)
        self.step = 0
        self.metrics: list[dict[str, float]] = []
        self.optimizers: list[torch.optim.Optimizer] = []
        self.writer = _tensorboard(self.folder) if tensorboard else None

    @classmethod
    def resume(cls, folder: Path, device: str = "cpu", tensorboard: bool = False) -> Loop:
        """Return the trainer at the last checkpoint of a run.

        Args:
            folder: folder of the run.
            device: torch device that trains.
            tensorboard: whether to log to a folder `tensorboard` too.

        Raises:
            CheckpointError: the folder has no checkpoint, or a damaged one.
            DataError: files of the data were added, removed or changed since the run began.
        """
        path = Path(folder) / STATE
        if not path.exists():
            raise CheckpointError(f"nothing to resume: no {path}")
        with _reading(path):
            state = torch.load(path, map_location=device, weights_only=True)
            settings, step, metrics = (state[name] for name in ("config", "step", "metrics"))
        trainer = cls(cls.CONFIG.from_dict(settings), folder, device, tensorboard)
        recorded = state.get("data", {})
        if trainer.data_state.keys() != recorded.keys():
            raise CheckpointError(
                f"{path}: another version of this package wrote it and recorded the data in another way, so it is "
                f"not known whether the data changed: begin a new run"
            )
        if trainer.data_state != recorded:
            data = trainer.config.data
            raise DataError(
                f"{data.path or data.source}: the data changed since the run began, from {recorded} to "
                f"{trainer.data_state}: restore the files, or begin a new run"
            )
        with _reading(path):
            trainer.load_state(state, path)
        trainer.step, trainer.metrics = step, metrics
        return trainer

    def run(self, quiet: bool = False) -> None:
        """Train to the last step. Ctrl-C or SIGTERM lets the current step end and writes a checkpoint before it acts.

        Args:
            quiet: whether to hide the progress bar.
        """
        training = self.config.training
        bar = tqdm(total=training.steps, initial=self.step, disable=quiet or None, unit="step", smoothing=0.05)
        try:
            order = ShuffledBatches(len(self.images), training.batch_size, training.seed, self.step, training.steps)
            with standard_defaults():
                for batch in batches(self.images, batch_sampler=order, num_workers=training.workers):
                    with uninterrupted():
                        self._take_step(batch, bar)
        except KeyboardInterrupt:
            self.save()
            raise
        finally:
            bar.close()
            if self.writer:
                self.writer.close()

    def _take_step(self, batch: list[torch.Tensor], bar: tqdm) -> None:
        """Train on a batch; then log, draw samples and write a checkpoint if they are due."""
        training, rate = self.config.training, self._set_learning_rate()
        metrics = self.train_step(generator(training.seed, self.step, 1), *batch)
        self.step += 1
        metrics = {"step": self.step, **metrics, "learning_rate": rate}
        bar.update()
        last = self.step == training.steps
        if last or (training.log_every and self.step % training.log_every == 0):
            self._log(metrics, bar)
        if training.sample_every and (last or self.step % training.sample_every == 0):
            self.save_samples(self.folder / "samples" / f"{self.step:07d}.png")
        if last or (training.checkpoint_every and self.step % training.checkpoint_every == 0):
            self.save()

    def add_optimizer(self, parameters: Iterable[nn.Parameter] | list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Return an AdamW optimizer with the settings of the run; its learning rate follows the schedule.

        Args:
            parameters: parameters to train, or parameter groups with settings of their own.
        """
        training = self.config.training
        optimizer = torch.optim.AdamW(
            parameters,
            lr=training.learning_rate,
            betas=(training.beta1, training.beta2),
            weight_decay=training.weight_decay,
            fused=True,
        )
        self.optimizers.append(optimizer)
        return optimizer

    def autocast(self) -> torch.autocast:
        """Return a context in which networks run in bfloat16 if the settings say so."""
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.config.training.bf16)

    def descend(
        self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], loss: torch.Tensor
    ) -> float:
        """Take one optimizer step down the clipped gradient of a loss, and return the gradient norm before clipping.

        Args:
            optimizer: optimizer that `add_optimizer` returned.
            parameters: parameters of that optimizer, in the order in which the norm adds them.
            loss: scalar.

        Raises:
            StarflowError: the loss is not finite.
        """
        if not torch.isfinite(loss):
            raise StarflowError(
                f"the loss is {loss.item()} at step {self.step}: nothing was saved since the last checkpoint; "
                f"lower training.learning_rate"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, self.config.training.clip or math.inf)
        optimizer.step()
        return norm.item()

    def save(self) -> None:
        """Write weights, settings, metrics and then the checkpoint, each file atomically."""
        self.save_weights()
        write_text(self.folder / SETTINGS, yaml.safe_dump(self.config.to_dict(), sort_keys=False))
        write_text(self.folder / METRICS, "".join(json.dumps(m) + "\n" for m in self.metrics))
        progress = {"data": self.data_state, "step": self.step, "metrics": self.metrics}
        state = {"config": self.config.to_dict(), **progress, **self.state()}
        write_atomically(self.folder / STATE, lambda path: torch.save(state, path))

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds in addition to settings, step and metrics."""
        return {name: part.state_dict() for name, part in self.parts().items()}

    def load_state(self, state: dict[str, Any], source: Path) -> None:
        """Restore what `state` returned.

        Args:
            state: content of a checkpoint.
            source: path of the checkpoint, for error messages.

        Raises:
            CheckpointError: names or shapes of the weights do not fit the settings.
        """
        for name, part in self.parts().items():
            try:
                part.load_state_dict(state[name])
            except RuntimeError as error:
                reason = str(error).splitlines()[-1].strip()
                raise CheckpointError(f"{source} does not fit its settings: {reason}") from None

    def _set_learning_rate(self) -> float:
        rate = self.config.training.learning_rate_at(self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        return rate

    def _log(self, metrics: dict[str, float], bar: tqdm) -> None:
        self.metrics.append(metrics)
        bar.set_postfix({name: f"{value:.4f}" for name, value in list(metrics.items())[1:3]})
        if self.writer:
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, self.step)

    def train_step(self, random: torch.Generator, *batch: torch.Tensor) -> dict[str, float]:
        """Take one step and return its metrics, the most important two first.

        Args:
            random: source of all random numbers of the step; it depends on the seed and the number of the step.
            batch: rows of the data set, one tensor per column.
        """
        raise NotImplementedError

    def parts(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        """Return the modules and optimizers that a checkpoint holds, by name."""
        raise NotImplementedError

    def save_samples(self, path: Path) -> None:
        """Write a grid of images that shows what the model has learned.

        Args:
            path: PNG file to write.
        """
        raise NotImplementedError

    def save_weights(self) -> None:
        """Write the trained model."""
        raise NotImplementedError


@contextlib.contextmanager
def standard_defaults() -> Iterator[None]:
    """Let new modules and the internals of torch use float32 and the CPU, whatever the defaults of torch are."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM act only at the end of the block, as far as Python handles them."""
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    handlers = {number: signal.getsignal(number) for number in numbers}
    held: list[int] = []
    for number, handler in handlers.items():
        if callable(handler):
            signal.signal(number, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if callable(handler):
                signal.signal(number, handler)
    if held:
        signal.raise_signal(held[0])


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Report the errors of a damaged checkpoint as a CheckpointError."""
    try:
        yield
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error}: it is damaged, or of another version of this package") from None
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}".splitlines()[0]) from None


def _tensorboard(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "--tensorboard needs the package tensorboard: pip install 'starflow-kernels[logging]'"
        ) from None
    return SummaryWriter(str(folder / "tensorboard"))
