"""Training of a flow."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import nn

from ..data.datasets import DataConfig, dequantize
from ..data.encode import folder_hash
from ..data.latents import EMPTY_PROMPT, draw_latents
from ..data.prompts import load_text, save_text, text_states
from ..data.reading import readable_row
from ..errors import CheckpointError, ConfigError
from ..io.files import write_folder
from ..io.images import save_grid
from ..models.checkpoint import remove_checkpoint, write_checkpoint
from ..models.config import FlowConfig
from ..models.flow import Flow
from ..sampling.sample import sample
from ..settings import read_section
from .checkpoints import PROGRESS, check_files, last_checkpoint, load_tensors, read_progress, read_shapes
from .config import LoopConfig, RunConfig
from .defaults import standard_defaults
from .loop import Loop
from .metrics import BlockTerms, Meter
from .parallel import Parallel, local, reduce_gradients
from .work import step_flops

# First part of the names of averaged weights in a checkpoint.
AVERAGE = "average."
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
        parallel: how the processes of torchrun share the weights: "data" gives each a copy, "fsdp" shards every layer.
            Each takes an equal share of the batch.
        reshard_after_forward: whether "fsdp" gathers the weights of a layer anew for the backward pass, which saves
            memory.
        accumulate: parts into which each process divides its share of the batch, one after another.
        checkpoint_layers: whether the backward pass computes each layer again instead of keeping its inner values.
        compile: whether torch compiles the layers.
    """

    ema: float = 0.0
    dropout: float = 0.0
    label_drop: float = 0.1
    latent_penalty: float = 0.0
    text_encoder: str = ""
    parallel: Parallel = "data"
    reshard_after_forward: bool = True
    accumulate: int = 1
    checkpoint_layers: bool = False
    compile: bool = False

    RANGES: ClassVar[dict[str, tuple[float, float]]] = {
        **LoopConfig.RANGES,
        "ema": (0, 1),
        "dropout": (0, 1),
        "label_drop": (0, 1.0001),
        "accumulate": (1, math.inf),
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
    SHARED = True

    def __init__(self, config: FlowRunConfig, folder: Path, device: str = "cpu", loggers: Collection[str] = ()):
        super().__init__(config, folder, device, loggers)
        self._check_data()
        self.trained, self.tokenizer = trained_modules(config, device)
        self.flow = cast("Flow", self.trained["model"])
        tokens, token_dim = config.model.token_shape
        self.meter = Meter(device, self.team.count, tokens, step_flops(config.model, 1))
        self._share_weights()
        self.terms = BlockTerms(self.flow.blocks, tokens * token_dim)
        self.average = {n: t.clone() for n, t in self.trained.state_dict().items()} if config.training.ema else None
        decay, exempt = [], []
        for name, parameter in self.trained.named_parameters():
            (exempt if name.endswith(WEIGHT_DECAY_EXEMPT) else decay).append(parameter)
        self.optimizer = self.add_optimizer([{"params": decay}, {"params": exempt, "weight_decay": 0.0}])

    def _share_weights(self) -> None:
        """Prepare the layers for what the settings ask for, and shard the weights over several processes."""
        training = self.config.training
        by_layers = self.team.count > 1 or training.checkpoint_layers or training.compile
        units: list[nn.Module] = []
        for block in self.flow.blocks:
            block.by_layers = by_layers
            for layer in block.layer_modules():
                layer.recomputes = training.checkpoint_layers
                if training.compile:
                    layer.compile()
                units.append(layer)
            units.append(block)
        sharded = training.parallel == "fsdp"
        dtype = torch.bfloat16 if training.bf16 and sharded else None
        for name, module in self.trained.items():
            parts = units if name == "model" else []
            self.team.shard(module, parts, training.parallel, sharded and training.reshard_after_forward, dtype)

    def train_step(self, random: torch.Generator, *batch: torch.Tensor) -> dict[str, float]:
        """Take one optimizer step on the flow's loss, then update its prior and the average of the weights."""
        training, model = self.config.training, self.config.model
        columns = self.conditions(batch, random)
        # Dropout draws from the global generator, in each process its own numbers.
        torch.manual_seed(random.initial_seed() + self.team.rank)
        count = training.accumulate
        nats, squares = [], []

        def losses() -> Iterator[torch.Tensor]:
            parts = ([None] * count if column is None else column.chunk(count) for column in columns)
            for i, (x, labels, text) in enumerate(zip(*parts)):
                # Shards of gradients are summed at once, for less memory.
                reduce_gradients(self.trained.values(), now=training.parallel == "fsdp" or i + 1 == count)
                with self.autocast():
                    if "text_encoder" in self.trained and text is not None:
                        text = text_states(text, self.tokenizer, self.trained["text_encoder"])
                    output = self.flow(x, labels, text, dropout=training.dropout)
                nats.append(self.flow.loss(output).detach() / count)
                squares.append(output.latents[-1].detach().square().mean(dim=0) / count)
                yield self.flow.loss(output, training.latent_penalty) / count

        loss, norm, taken = self.descend(self.optimizer, self.trained.parameters(), losses())
        if taken:
            if self.flow.prior_variance is not None:
                self.flow.move_prior(self.team.mean(sum(squares[1:], squares[0])))
            self._move_average()
        bits = bits_per_dim(self.team.mean(sum(nats[1:], nats[0])).item(), model.levels)
        terms = self.terms.read(self.team.mean)
        return {"loss": loss, "bits_per_dim": bits, "gradient_norm": norm, **terms}

    @torch.no_grad()
    def _move_average(self) -> None:
        """Move the average of the weights toward the weights."""
        if self.average is not None:
            # At first, the average follows the weights quickly.
            decay = min(self.config.training.ema, (2 + self.step) / (11 + self.step))
            weights = self.trained.state_dict()
            averages, current = ([local(tensors[name]) for name in weights] for tensors in (self.average, weights))
            torch._foreach_lerp_(averages, current, 1 - decay)

    def conditions(
        self, batch: tuple[torch.Tensor, ...], random: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Return noisy data, labels and text states of rows of a batch, with some of the conditions dropped.

        With a text encoder that is trained along, tokens take the place of the text states. Random numbers are drawn
        for the whole batch, so that they do not depend on the number of processes.

        Args:
            batch: columns of the data set: images or moments of latents, labels, and captions of latents.
            random: source of the noise, the dropped rows and the chosen captions.
        """
        training, model, own = self.config.training, self.config.model, self.team.own
        values, labels, *captions = map(self.team.padded, batch)
        if model.levels:
            x = dequantize(values, model.levels, model.noise_std, random)
        else:
            x = draw_latents(values, model.noise_std, random)
        dropped = torch.rand(len(labels), generator=random, dtype=torch.float32, device="cpu") < training.label_drop
        labels = own(labels.masked_fill(dropped, -1)).to(self.device) if model.num_classes else None
        text = None
        if model.text_dim:
            (rows,) = captions
            chosen = torch.randint(rows.shape[1], (len(rows), 1), generator=random, dtype=torch.int64, device="cpu")
            rows = own(rows.gather(1, chosen)[:, 0].masked_fill(dropped, EMPTY_PROMPT))
            texts = self.images.texts
            text = (texts.tokens(rows) if training.text_encoder else texts.states(rows)).to(self.device)
        return own(x).to(self.device), labels, text

    def parts(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        """Return the flow, the text encoder if it is trained, and their optimizer."""
        return {**self.trained, "optimizer": self.optimizer}

    def state(self) -> dict[str, torch.Tensor]:
        """Return weights, optimizer state and the average of the weights."""
        return {**super().state(), **{f"{AVERAGE}{name}": tensor for name, tensor in (self.average or {}).items()}}

    def save_samples(self, path: Path) -> None:
        """Write a grid of samples of the averaged weights; a flow on latents has none, for lack of an autoencoder."""
        if not self.config.model.levels:
            return
        if not (weights := self._weights("model")):
            return
        with standard_defaults():
            flow = Flow(self.config.model).to(self.device)
        flow.load_state_dict(weights)
        classes = self.config.model.num_classes
        labels = torch.arange(max(classes, 1), dtype=torch.int64, device="cpu").repeat(8)[:64] if classes else None
        count = 32 if labels is None else len(labels)
        images = sample(flow.eval(), count, labels, seed=self.config.training.seed).images
        save_grid(images, path, columns=min(classes, 16) or 8)

    def save_weights(self) -> None:
        """Write the flow and a text encoder that is trained, with the averaged weights if there is an average."""
        weights = {name: self._weights(name) for name in self.trained}
        if self.team.rank == 0:
            save_modules(self.config, weights, self.tokenizer, self.folder)

    def remove_weights(self) -> None:
        """Remove the flow that an earlier step wrote, so that its folder is no checkpoint of a flow."""
        remove_checkpoint(self.folder)

    def _weights(self, name: str) -> dict[str, torch.Tensor]:
        """Return the weights of a trained module, averaged if there is an average; none unless in the first process."""
        return self.team.gathered(named(name, self.average or self.trained.state_dict()))

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
        channels = readable_row(images, 0)[0].shape[-3]
        if channels != model.image_channels:
            raise ConfigError(f"model.image_channels={model.image_channels}, the images have {channels}")


def trained_modules(config: FlowRunConfig, device: str) -> tuple[nn.ModuleDict, Any]:
    """Return the flow and, if it is trained along, the text encoder, by their names in a checkpoint; and its tokenizer.

    Args:
        config: settings of the run, whose seed determines the weights of the flow.
        device: torch device of the weights.
    """
    tokenizer, text_encoder = None, None
    if config.training.text_encoder:
        tokenizer, text_encoder = load_text(config.training.text_encoder, device)
    torch.manual_seed(config.training.seed)
    with standard_defaults():
        trained = nn.ModuleDict({"model": Flow(config.model).to(device)})
    if text_encoder is not None:
        trained["text_encoder"] = text_encoder
    return trained, tokenizer


def save_modules(
    config: FlowRunConfig, weights: Mapping[str, dict[str, torch.Tensor]], tokenizer: Any, folder: Path
) -> None:
    """Write a flow and the text encoder that was trained along.

    Args:
        config: settings of the run.
        weights: weights by name of each of `trained_modules`.
        tokenizer: tokenizer of the text encoder.
        folder: folder to write into.
    """
    if "text_encoder" in weights:
        _, text_encoder = load_text(config.training.text_encoder, "cpu")
        text_encoder.load_state_dict(weights["text_encoder"])
        save_text(tokenizer, text_encoder, folder)
    write_checkpoint(folder, config.model, weights["model"], None)


def export(run: Path, out: Path) -> int:
    """Write the weights of the last checkpoint of a run, averaged if there is an average, and its settings.

    Args:
        run: folder of the run.
        out: folder to write.

    Returns:
        The number of steps that the checkpoint has taken.

    Raises:
        CheckpointError: the run has no checkpoint, a damaged one, or trains no flow.
        StarflowError: `out` exists.
    """
    path = last_checkpoint(run, "export")
    progress = read_progress(path)
    if "model" not in progress["config"]:
        raise CheckpointError(f"{run} trains no flow: its folder holds the weights of the last checkpoint")
    check_files(path, progress)
    config = read_section(str(path / PROGRESS), FlowRunConfig.from_dict, progress["config"])
    shapes = read_shapes(path)
    averages = {name: shape for name, shape in shapes.items() if name.startswith(AVERAGE)}
    prefix = AVERAGE if averages else ""
    trained, tokenizer = trained_modules(config, "cpu")
    weights = trained.state_dict()
    if wrong := sorted(name for name, tensor in weights.items() if shapes.get(f"{prefix}{name}") != tensor.shape):
        raise CheckpointError(f"{path} does not fit its settings: its {wrong[0]} is another, or not there")
    load_tensors(path, {f"{prefix}{name}": tensor for name, tensor in weights.items()})
    with write_folder(out) as folder:
        save_modules(config, {name: named(name, weights) for name in trained}, tokenizer, folder)
        config.save(folder)
    return progress["step"]


def named(module: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of a module by their names in it."""
    return {n.removeprefix(f"{module}."): t for n, t in tensors.items() if n.startswith(f"{module}.")}


def bits_per_dim(nats: float, levels: int) -> float:
    """Return bits per dimension for a mean of z^2 / 2 - logdet / dimensions.

    Args:
        nats: that mean, on data scaled to [-1, 1].
        levels: gray levels of the data, 0 for latents. The result for latents estimates a differential entropy, which
            may be negative.
    """
    return (nats + 0.5 * math.log(2 * math.pi)) / math.log(2) + (math.log2(levels / 2) if levels else 0.0)
