"""Training: a function of its settings and step number alone, so that a resumed run repeats an uninterrupted one."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from . import data
from .checkpoint import check_state, save_pretrained
from .config import FlowConfig
from .errors import CheckpointError, ConfigError, StarflowError
from .files import write_atomically, write_text
from .flow import Flow
from .sampling import sample, save_grid

STATE = "training.pt"
METRICS = "metrics.jsonl"
SETTINGS = "settings.yaml"
WEIGHT_DECAY_EXEMPT = ("bias", "norm.weight")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Settings of a run.

    steps, batch_size: of the optimiser. learning_rate rises linearly over warmup_steps, then falls to
    min_learning_rate along a cosine. weight_decay, beta1, beta2: of AdamW; biases and norms do not decay. clip: largest
    gradient norm, 0 for none. ema: decay of an average of the weights, which is then what is saved and sampled, 0 for
    none. dropout: on the residual branches. label_drop: fraction of labels replaced by "no class". latent_penalty: see
    Flow.loss. bf16: autocast the networks. workers: processes that read images. sample_every, checkpoint_every,
    log_every: in steps, 0 for never.
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
    ema: float = 0.0
    dropout: float = 0.0
    label_drop: float = 0.1
    latent_penalty: float = 0.0
    bf16: bool = False
    seed: int = 0
    workers: int = 0
    sample_every: int = 1000
    checkpoint_every: int = 1000
    log_every: int = 50

    def __post_init__(self):
        ranges = {"steps": (1, math.inf), "batch_size": (1, math.inf), "beta1": (0, 1), "beta2": (0, 1), "ema": (0, 1)}
        ranges |= {"dropout": (0, 1), "label_drop": (0, 1.0001)}
        for field in dataclasses.fields(self):
            value, (low, high) = getattr(self, field.name), ranges.get(field.name, (0, math.inf))
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


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run: model, data and training settings."""

    model: FlowConfig
    data: data.DataConfig
    training: TrainingConfig

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> RunConfig:
        """Config of nested mappings; unknown or missing settings raise a ConfigError that names them."""
        sections = {
            "model": FlowConfig.from_dict,
            "data": _reader(data.DataConfig),
            "training": _reader(TrainingConfig),
        }
        if not isinstance(settings, dict) or settings.keys() != sections.keys():
            raise ConfigError(f"settings need exactly the sections {', '.join(sections)}")
        for name, section in settings.items():
            if not isinstance(section, dict):
                raise ConfigError(f"settings: {name} is not a mapping")
        run = cls(**{name: read(settings[name]) for name, read in sections.items()})
        if run.model.image_size != run.data.size:
            raise ConfigError(f"model.image_size={run.model.image_size} but data.size={run.data.size}")
        return run

    def to_dict(self) -> dict[str, Any]:
        """Nested plain mappings."""
        return {
            "model": self.model.to_dict(),
            "data": dataclasses.asdict(self.data),
            "training": dataclasses.asdict(self.training),
        }


def _reader(kind: type):
    def read(fields: dict[str, Any]):
        known = {field.name for field in dataclasses.fields(kind)}
        if unknown := sorted(fields.keys() - known):
            raise ConfigError(
                f"unknown {kind.__name__} settings {', '.join(unknown)}; known: {', '.join(sorted(known))}"
            )
        try:
            return kind(**fields)
        except TypeError as error:
            raise ConfigError(f"{kind.__name__}: {error}") from None

    return read


class Trainer:
    """A run in a folder: settings, weights, checkpoint, metrics and sample grids."""

    def __init__(self, config: RunConfig, folder: Path, device: str = "cpu", tensorboard: bool = False):
        self.config, self.folder, self.device = config, Path(folder), device
        self.images, _ = data.load(config.data)
        self._check_data()
        torch.manual_seed(config.training.seed)
        self.flow = Flow(config.model).to(device)
        self.average = {n: t.clone() for n, t in self.flow.state_dict().items()} if config.training.ema else None
        decay, exempt = [], []
        for name, parameter in self.flow.named_parameters():
            (exempt if name.endswith(WEIGHT_DECAY_EXEMPT) else decay).append(parameter)
        training = config.training
        self.optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": training.weight_decay}, {"params": exempt, "weight_decay": 0.0}],
            lr=training.learning_rate,
            betas=(training.beta1, training.beta2),
            fused=True,
        )
        self.step = 0
        self.metrics: list[dict[str, float]] = []
        self.writer = _tensorboard(self.folder) if tensorboard else None

    @classmethod
    def resume(cls, folder: Path, device: str = "cpu", tensorboard: bool = False) -> Trainer:
        """Trainer at the last checkpoint in a run's folder; CheckpointError when there is none or it is damaged."""
        path = Path(folder) / STATE
        if not path.exists():
            raise CheckpointError(f"nothing to resume: no {path}")
        try:
            state = torch.load(path, map_location=device, weights_only=True)
            trainer = cls(RunConfig.from_dict(state["config"]), folder, device, tensorboard)
            check_state(trainer.flow, state["model"], path)
            trainer.flow.load_state_dict(state["model"])
            trainer.optimizer.load_state_dict(state["optimizer"])
            trainer.average, trainer.step, trainer.metrics = state["average"], state["step"], state["metrics"]
        except (RuntimeError, EOFError, KeyError, OSError, pickle.UnpicklingError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged: {error}".splitlines()[0]) from None
        return trainer

    def run(self, quiet: bool = False) -> None:
        """Train to the last step; a KeyboardInterrupt leaves a checkpoint behind."""
        training = self.config.training
        bar = tqdm(total=training.steps, initial=self.step, disable=quiet, unit="step", smoothing=0.05)
        try:
            order = data.ShuffledBatches(
                len(self.images), training.batch_size, training.seed, self.step, training.steps
            )
            for images, labels in DataLoader(self.images, batch_sampler=order, num_workers=training.workers):
                metrics = self.train_step(images, labels)
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

    def train_step(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """One step of the optimiser; its random numbers belong to the step's number."""
        training, model = self.config.training, self.config.model
        random = data.generator(training.seed, self.step, 1)
        x = data.dequantise(images, model.levels, model.noise_std, random).to(self.device)
        dropped = torch.rand(len(labels), generator=random) < training.label_drop
        labels = labels.masked_fill(dropped, -1).to(self.device) if model.num_classes else None
        # Dropout draws from the global generator.
        torch.manual_seed(random.initial_seed())

        rate = training.learning_rate_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=training.bf16):
            output = self.flow(x, labels, dropout=training.dropout)
        loss = self.flow.loss(output, training.latent_penalty)
        if not torch.isfinite(loss):
            raise StarflowError(
                f"the loss is {loss.item()} at step {self.step}: nothing was saved since the last checkpoint; "
                f"lower training.learning_rate"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.flow.parameters(), training.clip or math.inf)
        self.optimizer.step()
        self.flow.update_prior(output.latents[-1])
        self.step += 1
        if self.average is not None:
            # The average follows quickly at first: the decay of step n is at most (1 + n) / (10 + n).
            decay = min(training.ema, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.values()), list(self.flow.state_dict().values()), 1 - decay)
        return {
            "step": self.step,
            "loss": loss.item(),
            "bits_per_dim": bits_per_dim(self.flow.loss(output).item(), model.levels),
            "gradient_norm": norm.item(),
            "learning_rate": rate,
        }

    def log(self, metrics: dict[str, float], bar: tqdm) -> None:
        """Append to metrics.jsonl, the progress bar and TensorBoard."""
        self.metrics.append(metrics)
        bar.set_postfix(loss=f"{metrics['loss']:.4f}", bpd=f"{metrics['bits_per_dim']:.3f}")
        if self.writer:
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, self.step)

    def save_samples(self) -> None:
        """Write a grid of samples of the averaged weights."""
        flow = Flow(self.config.model).to(self.device)
        flow.load_state_dict(self.average or self.flow.state_dict())
        classes = self.config.model.num_classes
        labels = torch.arange(max(classes, 1)).repeat(8)[:64] if classes else None
        count = 32 if labels is None else len(labels)
        images = sample(flow.eval(), count, labels, seed=self.config.training.seed).images
        save_grid(images, self.folder / "samples" / f"{self.step:07d}.png", columns=min(classes, 16) or 8)

    def save(self) -> None:
        """Write weights, settings, metrics and the state that `resume` reads, each atomically, the state last."""
        save_pretrained(self.flow, self.folder, self.average)
        write_text(self.folder / SETTINGS, yaml.safe_dump(self.config.to_dict(), sort_keys=False))
        write_text(self.folder / METRICS, "".join(json.dumps(m) + "\n" for m in self.metrics))
        state = {
            "config": self.config.to_dict(),
            "step": self.step,
            "model": self.flow.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "metrics": self.metrics,
        }
        write_atomically(self.folder / STATE, lambda path: torch.save(state, path))

    def _check_data(self) -> None:
        model, images = self.config.model, self.images
        if not len(images):
            raise ConfigError("data: no images are left for training")
        if model.num_classes and model.num_classes < len(images.classes):
            raise ConfigError(f"model.num_classes={model.num_classes}, the data has {len(images.classes)} classes")
        if model.levels != images.levels:
            raise ConfigError(f"model.levels={model.levels}, the data has {images.levels} grey levels")
        if model.text_dim:
            raise ConfigError("model.text_dim: these data sets have no text")
        channels = images[0][0].shape[0]
        if channels != model.image_channels:
            raise ConfigError(f"model.image_channels={model.image_channels}, the images have {channels}")


def bits_per_dim(nats: float, levels: int) -> float:
    """bits a dimension of mean z^2 / 2 - logdet / dimensions on [-1, 1] data of `levels` grey levels."""
    return (nats + 0.5 * math.log(2 * math.pi)) / math.log(2) + math.log2(levels / 2)


def _tensorboard(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "--tensorboard needs the package tensorboard: pip install starflow-kernels[logging]"
        ) from None
    return SummaryWriter(str(folder / "tensorboard"))
