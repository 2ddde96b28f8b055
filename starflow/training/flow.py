"""Training of a flow."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ..data.datasets import DataConfig, dequantize
from ..data.encode import folder_hash
from ..data.latents import EMPTY_PROMPT, draw_latents
from ..data.prompts import load_text, save_text, text_states
from ..errors import CheckpointError, ConfigError
from ..io.images import save_grid
from ..models.checkpoint import check_state
from ..models.config import FlowConfig
from ..models.flow import Flow
from ..sampling.sample import sample
from .loop import Loop, LoopConfig, RunConfig, standard_defaults

WEIGHT_DECAY_EXEMPT = ("bias", "norm.weight")


@dataclasses.dataclass(frozen=True)
class FlowTrainingConfig(LoopConfig):
    """Settings for training a flow, in addition to `LoopConfig`. Biases and norms have no weight decay.

    Args:
        ema: decay of the moving average of the weights. The average is saved and sampled from; 0 turns it off.
        dropout: dropout probability on the residual branches.
        label_drop: fraction of labels replaced by "no class", and of captions by the empty prompt.
        latent_penalty: weight of the latents in the loss, see `Flow.loss`.
        text_encoder: folder with a text_encoder/ and its tokenizer/ to train along with the flow, those with which the
            latents were encoded. Without one, the flow takes the text states in the cache.
    """

    ema: float = 0.0
    dropout: float = 0.0
    label_drop: float = 0.1
    latent_penalty: float = 0.0
    text_encoder: str = ""

    RANGES: ClassVar[dict[str, tuple[float, float]]] = {
        **LoopConfig.RANGES,
        "ema": (0, 1),
        "dropout": (0, 1),
        "label_drop": (0, 1.0001),
    }


@dataclasses.dataclass(frozen=True)
class FlowRunConfig(RunConfig):
    """Settings that determine the training of a flow."""

    model: FlowConfig
    data: DataConfig
    training: FlowTrainingConfig

    def __post_init__(self):
        if self.model.image_size != self.data.size:
            raise ConfigError(f"model.image_size={self.model.image_size} but data.size={self.data.size}")


class FlowTrainer(Loop):
    """Training run of a flow. `Flow.from_pretrained` reads its folder."""

    CONFIG = FlowRunConfig
    COMMAND = "train"

    def __init__(self, config: FlowRunConfig, folder: Path, device: str = "cpu", tensorboard: bool = False):
        super().__init__(config, folder, device, tensorboard)
        self.tokenizer, text_encoder = None, None
        if config.training.text_encoder:
            self.tokenizer, text_encoder = load_text(config.training.text_encoder, device)
        self._check_data()
        torch.manual_seed(config.training.seed)
        with standard_defaults():
            self.flow = Flow(config.model).to(device)
        # The modules that are trained, by their names in a checkpoint.
        self.trained = nn.ModuleDict({"model": self.flow})
        if text_encoder is not None:
            self.trained["text_encoder"] = text_encoder
        self.average = {n: t.clone() for n, t in self.trained.state_dict().items()} if config.training.ema else None
        decay, exempt = [], []
        for name, parameter in self.trained.named_parameters():
            (exempt if name.endswith(WEIGHT_DECAY_EXEMPT) else decay).append(parameter)
        self.optimizer = self.add_optimizer([{"params": decay}, {"params": exempt, "weight_decay": 0.0}])

    def train_step(self, random: torch.Generator, *batch: torch.Tensor) -> dict[str, float]:
        """Take one optimizer step on the flow's loss, then update its prior and the average of the weights."""
        training, model = self.config.training, self.config.model
        x, labels, text = self.conditions(batch, random)
        # Dropout draws from the global generator.
        torch.manual_seed(random.initial_seed())
        with self.autocast():
            if "text_encoder" in self.trained and text is not None:
                text = text_states(text, self.tokenizer, self.trained["text_encoder"])
            output = self.flow(x, labels, text, dropout=training.dropout)
        loss = self.flow.loss(output, training.latent_penalty)
        norm = self.descend(self.optimizer, self.trained.parameters(), loss)
        self.flow.update_prior(output.latents[-1])
        if self.average is not None:
            # At first, the average follows the weights quickly.
            decay = min(training.ema, (2 + self.step) / (11 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.values()), list(self.trained.state_dict().values()), 1 - decay)
        bits = bits_per_dim(self.flow.loss(output).item(), model.levels)
        return {"loss": loss.item(), "bits_per_dim": bits, "gradient_norm": norm}

    def conditions(
        self, batch: tuple[torch.Tensor, ...], random: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Return noisy data, labels and text states of a batch, with some of the conditions dropped.

        With a text encoder that is trained along, tokens take the place of the text states.

        Args:
            batch: columns of the data set: images or moments of latents, labels, and captions of latents.
            random: source of the noise, the dropped rows and the chosen captions.
        """
        training, model = self.config.training, self.config.model
        values, labels = batch[:2]
        if model.levels:
            x = dequantize(values, model.levels, model.noise_std, random)
        else:
            x = draw_latents(values, model.noise_std, random)
        dropped = torch.rand(len(labels), generator=random, dtype=torch.float32, device="cpu") < training.label_drop
        labels = labels.masked_fill(dropped, -1).to(self.device) if model.num_classes else None
        text = None
        if model.text_dim:
            captions = batch[2]
            chosen = torch.randint(
                captions.shape[1], (len(captions), 1), generator=random, dtype=torch.int64, device="cpu"
            )
            chosen = captions.gather(1, chosen)
            rows, texts = chosen[:, 0].masked_fill(dropped, EMPTY_PROMPT), self.images.texts
            text = (texts.tokens(rows) if training.text_encoder else texts.states(rows)).to(self.device)
        return x.to(self.device), labels, text

    def parts(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        """Return the flow, the text encoder if it is trained, and their optimizer."""
        return {**self.trained, "optimizer": self.optimizer}

    def state(self) -> dict[str, Any]:
        """Return weights, optimizer state and the average of the weights."""
        return {**super().state(), "average": self.average}

    def load_state(self, state: dict[str, Any], source: Path) -> None:
        """Restore what `state` returned."""
        check_state(self.flow, state["model"], source)
        super().load_state(state, source)
        self.average = state["average"]
        if self.average is not None and self.average.keys() != self.trained.state_dict().keys():
            raise CheckpointError(f"{source}: its average has other weights than the model: begin a new run")

    def save_samples(self, path: Path) -> None:
        """Write a grid of samples of the averaged weights; a flow on latents has none, for lack of an autoencoder."""
        if not self.config.model.levels:
            return
        with standard_defaults():
            flow = Flow(self.config.model).to(self.device)
        flow.load_state_dict(self._weights("model"))
        classes = self.config.model.num_classes
        labels = torch.arange(max(classes, 1), dtype=torch.int64, device="cpu").repeat(8)[:64] if classes else None
        count = 32 if labels is None else len(labels)
        images = sample(flow.eval(), count, labels, seed=self.config.training.seed).images
        save_grid(images, path, columns=min(classes, 16) or 8)

    def save_weights(self) -> None:
        """Write the flow and a text encoder that is trained, with the averaged weights if there is an average."""
        if "text_encoder" in self.trained:
            text_encoder = copy.deepcopy(self.trained["text_encoder"])
            text_encoder.load_state_dict(self._weights("text_encoder"))
            save_text(self.tokenizer, text_encoder, self.folder)
        self.flow.save_pretrained(self.folder, self._weights("model"))

    def _weights(self, name: str) -> dict[str, torch.Tensor]:
        """Return the weights of a trained module, averaged if there is an average."""
        if self.average is None:
            return self.trained[name].state_dict()
        return {n.removeprefix(f"{name}."): t for n, t in self.average.items() if n.startswith(f"{name}.")}

    def _check_data(self) -> None:
        model, images = self.config.model, self.images
        if model.num_classes and model.num_classes < len(images.classes):
            raise ConfigError(f"model.num_classes={model.num_classes}, the data has {len(images.classes)} classes")
        if model.levels != images.levels:
            raise ConfigError(f"model.levels={model.levels}, the data has {images.levels} gray levels")
        texts = getattr(images, "texts", None)
        if model.text_dim and texts is None:
            raise ConfigError("model.text_dim: this data has no text; latents encoded with a text encoder have")
        if model.text_dim and (model.text_len, model.text_dim) != texts.shape:
            raise ConfigError(
                f"model.text_len={model.text_len}, model.text_dim={model.text_dim}: the text states are "
                f"{texts.shape[0]} x {texts.shape[1]}"
            )
        if model.text_dim and not (texts.has_states or self.config.training.text_encoder):
            raise ConfigError("training.text_encoder: needed, since the latents were encoded with text_dtype 'none'")
        if folder := self.config.training.text_encoder:
            if not model.text_dim:
                raise ConfigError("training.text_encoder: given, but model.text_dim is 0")
            if folder_hash(Path(folder) / "tokenizer") != texts.tokenizer:
                raise ConfigError(f"training.text_encoder={folder}: the latents were encoded with another tokenizer")
        channels = images[0][0].shape[-3]
        if channels != model.image_channels:
            raise ConfigError(f"model.image_channels={model.image_channels}, the images have {channels}")


def bits_per_dim(nats: float, levels: int) -> float:
    """Return bits per dimension for a mean of z^2 / 2 - logdet / dimensions.

    Args:
        nats: that mean, on data scaled to [-1, 1].
        levels: gray levels of the data, 0 for latents. The result for latents estimates a differential entropy, which
            may be negative.
    """
    return (nats + 0.5 * math.log(2 * math.pi)) / math.log(2) + (math.log2(levels / 2) if levels else 0.0)
