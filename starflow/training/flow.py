"""Training of a flow: a function of its settings and step number alone, see `Loop`."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import datasets
from ..data.latents import EMPTY_PROMPT, draw_latents
from ..errors import ConfigError
from ..models.checkpoint import check_state, save_pretrained
from ..models.config import FlowConfig
from ..models.flow import Flow
from ..sampling.sample import sample, save_grid
from ..settings import read_sections, section
from .loop import Loop, LoopConfig

WEIGHT_DECAY_EXEMPT = ("bias", "norm.weight")


@dataclasses.dataclass(frozen=True)
class TrainingConfig(LoopConfig):
    """Settings of a run, with those of `LoopConfig`; biases and norms do not decay.

    ema: decay of an average of the weights, which is then what is saved and sampled, 0 for none. dropout: on the
    residual branches. label_drop: fraction of labels replaced by "no class", of captions by the empty prompt.
    latent_penalty: see Flow.loss. bf16: autocast the networks.
    """

    ema: float = 0.0
    dropout: float = 0.0
    label_drop: float = 0.1
    latent_penalty: float = 0.0
    bf16: bool = False


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run: model, data and training settings."""

    model: FlowConfig
    data: datasets.DataConfig
    training: TrainingConfig

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> RunConfig:
        """Config of nested mappings; unknown or missing settings raise a ConfigError that names them."""
        readers = {
            "model": FlowConfig.from_dict,
            "data": section(datasets.DataConfig),
            "training": section(TrainingConfig),
        }
        run = cls(**read_sections(settings, readers))
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


class Trainer(Loop):
    """A run of a flow in a folder."""

    CONFIG = RunConfig
    COMMAND = "train"

    def __init__(self, config: RunConfig, folder: Path, device: str = "cpu", tensorboard: bool = False):
        super().__init__(config, folder, device, tensorboard)
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

    def train_step(self, *batch: torch.Tensor) -> dict[str, float]:
        """One step of the optimiser; its random numbers belong to the step's number."""
        training, model = self.config.training, self.config.model
        random = datasets.generator(training.seed, self.step, 1)
        x, labels, text = self._conditions(batch, random)
        # Dropout draws from the global generator.
        torch.manual_seed(random.initial_seed())

        rate = self.set_learning_rate(self.optimizer)
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=training.bf16):
            output = self.flow(x, labels, text, dropout=training.dropout)
        loss = self.flow.loss(output, training.latent_penalty)
        self.check_finite(loss)
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

    def _conditions(
        self, batch: tuple[torch.Tensor, ...], random: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Noisy data, labels and text states of a batch; some of the conditions are dropped."""
        training, model = self.config.training, self.config.model
        values, labels = batch[:2]
        if model.levels:
            x = datasets.dequantise(values, model.levels, model.noise_std, random)
        else:
            x = draw_latents(values, model.noise_std, random)
        dropped = torch.rand(len(labels), generator=random) < training.label_drop
        labels = labels.masked_fill(dropped, -1).to(self.device) if model.num_classes else None
        text = None
        if model.text_dim:
            captions = batch[2]
            chosen = captions.gather(1, torch.randint(captions.shape[1], (len(captions), 1), generator=random))
            text = self.images.texts.states(chosen[:, 0].masked_fill(dropped, EMPTY_PROMPT)).to(self.device)
        return x.to(self.device), labels, text

    def save_samples(self) -> None:
        """Write a grid of samples of the averaged weights; none of latents, which need their autoencoder."""
        if not self.config.model.levels:
            return
        flow = Flow(self.config.model).to(self.device)
        flow.load_state_dict(self.average or self.flow.state_dict())
        classes = self.config.model.num_classes
        labels = torch.arange(max(classes, 1)).repeat(8)[:64] if classes else None
        count = 32 if labels is None else len(labels)
        images = sample(flow.eval(), count, labels, seed=self.config.training.seed).images
        save_grid(images, self.folder / "samples" / f"{self.step:07d}.png", columns=min(classes, 16) or 8)

    def save_weights(self) -> None:
        """Write model.safetensors and config.json, the averaged weights where there is an average."""
        save_pretrained(self.flow, self.folder, self.average)

    def state(self) -> dict[str, Any]:
        """Weights, their average, and the optimiser's moments."""
        return {"model": self.flow.state_dict(), "average": self.average, "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict[str, Any], source: Path) -> None:
        """Take back what `state` gave."""
        check_state(self.flow, state["model"], source)
        self.flow.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average = state["average"]

    def _check_data(self) -> None:
        model, images = self.config.model, self.images
        if model.num_classes and model.num_classes < len(images.classes):
            raise ConfigError(f"model.num_classes={model.num_classes}, the data has {len(images.classes)} classes")
        if model.levels != images.levels:
            raise ConfigError(f"model.levels={model.levels}, the data has {images.levels} grey levels")
        texts = getattr(images, "texts", None)
        if model.text_dim and texts is None:
            raise ConfigError("model.text_dim: this data has no text; latents encoded with a text encoder have")
        if model.text_dim and (model.text_len, model.text_dim) != texts.shape:
            raise ConfigError(
                f"model.text_len={model.text_len}, model.text_dim={model.text_dim}: the text states are "
                f"{texts.shape[0]} x {texts.shape[1]}"
            )
        channels = images[0][0].shape[-3]
        if channels != model.image_channels:
            raise ConfigError(f"model.image_channels={model.image_channels}, the images have {channels}")


def bits_per_dim(nats: float, levels: int) -> float:
    """bits a dimension of mean z^2 / 2 - logdet / dimensions on [-1, 1] data of `levels` grey levels; of continuous
    data, levels 0, it is the differential entropy's estimate and may be negative."""
    return (nats + 0.5 * math.log(2 * math.pi)) / math.log(2) + (math.log2(levels / 2) if levels else 0.0)
