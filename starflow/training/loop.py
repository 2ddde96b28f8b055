"""Training loop that all trainers share, and the settings of a run.

A step depends only on the settings, its number and the state in the checkpoint. A resumed run therefore gives the same
bits as an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from ..data.batches import ShuffledBatches
from ..data.datasets import DataConfig, data_state, load
from ..data.reading import Broken, training_batches
from ..errors import CheckpointError, ConfigError, DataError, StarflowError
from ..io.files import check_writable, located, remove_leftovers, write_text
from ..seeds import generator
from ..settings import read_section
from .checkpoints import (
    PROGRESS,
    Checkpoints,
    check_files,
    damaged,
    flat_state,
    last_checkpoint,
    load_tensors,
    make_state,
    read_progress,
    read_shapes,
)
from .config import RunConfig
from .defaults import standard_defaults
from .guard import Guard
from .lock import Lock
from .metrics import Meter, open_loggers
from .parallel import LostProcessError, Team, check_division, refuse_processes, scalar
from .signals import uninterrupted

METRICS = "metrics.jsonl"
SAMPLES = "samples"
# Messages of torch when a process of the run is gone.
LOST_PROCESS = re.compile("gloo|connection (closed|reset)|NCCL|broken pipe|socket", re.IGNORECASE)


class Descent(NamedTuple):
    """Result of `Loop.descend`.

    Attributes:
        loss: loss, the mean over the processes.
        norm: norm of the gradient before clipping.
        taken: whether the optimizer took the step.
    """

    loss: float
    norm: float
    taken: bool


class Loop:
    """Training run in a folder, with settings, weights, checkpoint, metrics and sample grids.

    A trainer sets CONFIG and COMMAND and defines the methods from `train_step` on. Its constructor makes the modules
    and calls `add_optimizer`.

    Args:
        config: settings of the run, of the type CONFIG.
        folder: folder of the run; it is created if it does not exist.
        device: torch device that trains.
        loggers: names of `metrics.LOGGERS` to log to, beside the file of the metrics.
    """

    CONFIG: ClassVar[type[RunConfig]]
    COMMAND: ClassVar[str]
    # Whether several processes may train together.
    SHARED: ClassVar[bool] = False

    def __init__(self, config: Any, folder: Path, device: str = "cpu", loggers: Collection[str] = ()):
        self.config, self.folder, self.device = config, Path(folder), device
        if not self.SHARED:
            refuse_processes(self.COMMAND)
        self.team = Team(device)
        check_writable(self.folder)
        self.lock = Lock(self.folder)
        self.checkpoints = Checkpoints(self.folder, config.training.keep_checkpoints, self.team.group)
        self.images, _ = load(config.data)
        if not len(self.images):
            raise ConfigError("data: no images are left for training")
        self.data_state = data_state(config.data)
        batch_size = min(config.training.batch_size, len(self.images))
        accumulate = getattr(config.training, "accumulate", 1)
        check_division(config.training.batch_size, self.team.count, accumulate, len(self.images))
        if batch_size < config.training.batch_size and self.team.rank == 0:
            warnings.warn(
                f"training.batch_size={config.training.batch_size} exceeds the {batch_size} images of the data: each "
                f"step takes {batch_size}",
                stacklevel=2,
            )
        self.rows = self.team.rows(batch_size)
        self.step = 0
        self.metrics: list[dict[str, float]] = []
        self.broken: Broken = {}
        self.optimizers: list[torch.optim.Optimizer] = []
        self.guards: list[Guard] = []
        self.speeds: list[dict[str, float]] = []
        self.meter = Meter(device, self.team.count)
        self.loggers = open_loggers(() if self.team.rank else loggers, self.folder, config.to_dict())

    @classmethod
    def resume(cls, folder: Path, device: str = "cpu", loggers: Collection[str] = ()) -> Loop:
        """Return the trainer at the last checkpoint of a run.

        Args:
            folder: folder of the run.
            device: torch device that trains.
            loggers: names of `metrics.LOGGERS` to log to, beside the file of the metrics.

        Raises:
            CheckpointError: the folder has no checkpoint, or a damaged one.
            DataError: files of the data were added, removed or changed since the run began.
            StarflowError: another process trains this run.
        """
        Lock(folder).check()
        path = last_checkpoint(folder)
        progress = read_progress(path)
        step, guards = progress["step"], progress["guards"]
        config = read_section(str(path / PROGRESS), cls.CONFIG.from_dict, progress["config"])
        check_path(config.data)
        trainer = cls(config, folder, device, loggers)
        if len(guards) != len(trainer.guards):
            raise damaged(path / PROGRESS, f"it has {len(guards)} guards, the run {len(trainer.guards)}")
        recorded = progress["data"]
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
        trainer.team.processes.first(lambda: check_files(path, progress))
        trainer.load_state(path)
        for guard, state in zip(trainer.guards, guards):
            try:
                guard.load_state(state)
            except ValueError as error:
                raise damaged(path / PROGRESS, str(error)) from None
        trainer.step = trainer.checkpoints.last = step
        trainer.metrics, trainer.speeds = progress["metrics"], progress["speeds"]
        trainer.broken = dict.fromkeys(progress["broken"], "")
        return trainer

    def run(self, quiet: bool = False) -> None:
        """Train to the last step. Ctrl-C or SIGTERM lets the current step end and writes a checkpoint before it acts.

        Args:
            quiet: whether to hide the progress bar.

        Raises:
            LostProcessError: another process has ended. This one should too, without waiting for its threads.
            StarflowError: another process trains this run.
        """
        self.team.processes.first(self._begin)
        training = self.config.training
        hidden = True if self.team.rank else quiet or None
        bar = tqdm(total=training.steps, initial=self.step, disable=hidden, unit="step", smoothing=0.05)
        try:
            with standard_defaults(), contextlib.ExitStack() as stack:
                # Processes together stop after a step that all have taken.
                held = stack.enter_context(uninterrupted()) if self.team.count > 1 else []
                try:
                    self._take_steps(bar, held)
                except KeyboardInterrupt:
                    self.save()
                    self.checkpoints.wait()
                    raise
                except StarflowError:
                    self.checkpoints.wait()
                    raise
                self.checkpoints.wait()
        except RuntimeError as error:
            if not (self.team.count > 1 and LOST_PROCESS.search(str(error))):
                raise
            raise LostProcessError("another process of this run has ended, see its message") from error
        finally:
            bar.close()
            self.lock.release()
            for logger in self.loggers:
                logger.close()

    def _begin(self) -> None:
        """Take the lock on the run, and remove what a process that was killed has left behind."""
        self.lock.acquire()
        for folder in (self.folder, self.folder / SAMPLES, self.checkpoints.folder):
            remove_leftovers(folder)

    def _take_steps(self, bar: tqdm, held: list[int]) -> None:
        """Train to the last step, or until a signal is held in any process."""
        training = self.config.training
        self.meter.start()
        order = ShuffledBatches(
            len(self.images), training.batch_size, training.seed, self.step, training.steps, self.rows
        )
        speaks = self.team.rank == 0
        read = training_batches(self.images, order, training.workers, self.device, self.broken, speaks)
        # Workers end with their iterator, which an error would keep.
        with contextlib.closing(read):
            for batch in read:
                with uninterrupted():
                    self._take_step(batch, bar)
                if self.team.any(bool(held)):
                    raise KeyboardInterrupt

    def _take_step(self, batch: list[torch.Tensor], bar: tqdm) -> None:
        """Train on a batch; then log, draw samples and write a checkpoint if they are due."""
        training, rate = self.config.training, self._set_learning_rate()
        metrics = self.train_step(generator(training.seed, self.step, 1), *batch)
        self.meter.stop(min(training.batch_size, len(self.images)))
        self.step += 1
        skipped = sum(guard.skipped for guard in self.guards)
        metrics = {"step": self.step, **metrics, "learning_rate": rate, "skipped_steps": skipped}
        bar.update()
        last = self.step == training.steps
        if last or (training.log_every and self.step % training.log_every == 0):
            self._log(metrics, bar)
        if training.sample_every and (last or self.step % training.sample_every == 0):
            self.save_samples(self.folder / SAMPLES / f"{self.step:07d}.png")
        if last or (training.checkpoint_every and self.step % training.checkpoint_every == 0):
            self.save()
        self.meter.start()

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
        self.guards.append(Guard(training.spike_factor, training.max_skips, self.team.rank == 0))
        return optimizer

    def autocast(self) -> torch.autocast:
        """Return a context in which networks run in bfloat16 if the settings say so."""
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.config.training.bf16)

    def descend(
        self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], losses: Iterable[torch.Tensor]
    ) -> Descent:
        """Take one optimizer step down the clipped gradient of a loss, unless the guard of the optimizer skips it.

        Args:
            optimizer: optimizer that `add_optimizer` returned.
            parameters: parameters of that optimizer, in the order in which the norm adds them.
            losses: scalars, whose sum is the loss of this process. The next one is asked for after the backward pass of
                the last one.

        Raises:
            StarflowError: too many steps in a row were skipped.
        """
        optimizer.zero_grad(set_to_none=True)
        parts = []
        for loss in losses:
            loss.backward()
            parts.append(loss.detach())
        mean = self.team.mean(sum(parts[1:], parts[0])).item()
        norm = scalar(nn.utils.clip_grad_norm_(parameters, self.config.training.clip or math.inf))
        taken = self.guards[self.optimizers.index(optimizer)].accepts(self.step, mean, norm)
        if taken:
            optimizer.step()
        return Descent(mean, norm, taken)

    def save(self) -> None:
        """Write weights, settings and metrics, each file atomically, and begin to write the checkpoint.

        Several processes write the weights at the end only, since these must be gathered, and remove those of an
        earlier step. `export` reads them from a checkpoint.
        """
        if self.team.count == 1 or self.step == self.config.training.steps:
            self.save_weights()
        elif self.team.rank == 0:
            self.remove_weights()
        if self.team.rank == 0:
            self.config.save(self.folder)
            lines = [json.dumps({**m, **speed}) + "\n" for m, speed in zip(self.metrics, self.speeds)]
            write_text(self.folder / METRICS, "".join(lines))
        self._share_broken()
        progress = {"data": self.data_state, "step": self.step, "metrics": self.metrics, "broken": sorted(self.broken)}
        progress["speeds"] = self.speeds
        guards = [guard.state() for guard in self.guards]
        self.checkpoints.save(self.step, self.state(), {"config": self.config.to_dict(), "guards": guards, **progress})

    def state(self) -> dict[str, torch.Tensor]:
        """Return the tensors of a checkpoint by name."""
        return {
            f"{name}.{key}": tensor for name, part in self.parts().items() for key, tensor in flat_state(part).items()
        }

    def load_state(self, path: Path) -> None:
        """Read the tensors of a checkpoint.

        Args:
            path: the checkpoint.

        Raises:
            CheckpointError: it is damaged, or names or shapes of its tensors do not fit the settings.
        """
        saved = read_shapes(path)
        for name, part in self.parts().items():
            if isinstance(part, torch.optim.Optimizer):
                make_state(part, {key.removeprefix(f"{name}.") for key in saved if key.startswith(f"{name}.")})
        tensors = self.state()
        expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if wrong := sorted(name for name, _ in expected.items() ^ saved.items()):
            raise CheckpointError(f"{path} does not fit its settings: its {wrong[0]} is another, or not there")
        load_tensors(path, tensors, self.team.group)

    def _set_learning_rate(self) -> float:
        rate = self.config.training.learning_rate_at(self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        return rate

    def _share_broken(self) -> None:
        """Let every process know the images that one of them could not read."""
        self.broken |= dict.fromkeys(self.team.union(self.broken) - self.broken.keys(), "")

    def _log(self, metrics: dict[str, float], bar: tqdm) -> None:
        self._share_broken()
        metrics["broken_images"] = len(self.broken)
        self.metrics.append(metrics)
        bar.set_postfix({name: f"{value:.4f}" for name, value in list(metrics.items())[1:3]})
        self.speeds.append(self.meter.read())
        for logger in self.loggers:
            logger.log({**metrics, **self.speeds[-1]}, self.step)

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

    def remove_weights(self) -> None:
        """Remove the trained model of an earlier step; the first of several processes alone calls this."""
        raise NotImplementedError


def check_path(data: DataConfig) -> None:
    """Check that the data of a run that goes on are where they were.

    Args:
        data: the data, which may be a data set on the Hugging Face hub.

    Raises:
        DataError: they are not.
    """
    if data.path and data.source != "huggingface" and not Path(data.path).exists():
        raise DataError(
            f"the data of this run are not at {located(Path(data.path))}: put them there, or start where the path holds"
        )
