"""Training of a text-to-image pipeline in stages: autoencoder, text encoder, latents, flow, decoder.

Each stage has a folder in the folder of the run. A finished stage is left as it is, and an interrupted one continues at
its last checkpoint.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import yaml

from ..data.datasets import DataConfig, load
from ..data.encode import EncodeConfig, distinct_captions, encode
from ..data.prompts import load_text, save_text
from ..data.vocabulary import TextConfig, make_tokenizer
from ..errors import CheckpointError, ConfigError
from ..io.files import write_folder, write_text
from ..models.autoencoder import load_vae
from ..models.flow import Flow
from ..settings import check_types, read_section, read_sections, read_settings, section
from .autoencoder import AutoencoderRunConfig, AutoencoderTrainer
from .checkpoints import latest
from .config import SETTINGS, RunConfig
from .decoder import DecoderRunConfig, DecoderTrainer
from .defaults import standard_defaults
from .flow import FlowRunConfig, FlowTrainer
from .loop import Loop

# Sections with a seed of their own.
SEEDED = ("autoencoder.training", "text", "flow.training", "decoder.training")


@dataclasses.dataclass(frozen=True)
class SavedConfig:
    """Defaults and license notice of the finished pipeline.

    Args:
        guidance: guidance weight.
        denoise: factor of the score step, 0 for none, as the decoder is trained on noisy latents.
        notice: license notice, for instance of the training images.
    """

    guidance: float = 1.0
    denoise: float = 0.0
    notice: str = ""

    def __post_init__(self):
        check_types(self)
        if not (0 <= self.guidance < math.inf and 0 <= self.denoise < math.inf):
            raise ConfigError(f"guidance={self.guidance}, denoise={self.denoise}: expected numbers >= 0")


# Sections and their readers; a section that dict reads is completed from others.
SECTIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "data": section(DataConfig),
    "autoencoder": dict,
    "text": section(TextConfig),
    "latents": dict,
    "flow": dict,
    "decoder": dict,
    "pipeline": section(SavedConfig),
}


class PipelineTrainer:
    """Training run of a pipeline in a folder.

    Args:
        settings: mapping of SECTIONS. The images are those of `data`, with changes in `autoencoder.data`, `latents` and
            `decoder.data`. What follows from an earlier stage is not set: folders, the shapes of the latents and of the
            text states, and the noise of the decoder.
        folder: folder of the run.
        device: torch device that trains.
        loggers: names of `metrics.LOGGERS` that each stage logs to.

    Raises:
        ConfigError: a setting is unknown, missing or out of range.
    """

    COMMAND = "train-pipeline"

    def __init__(self, settings: dict[str, Any], folder: Path, device: str = "cpu", loggers: Collection[str] = ()):
        self.settings, self.folder, self.device, self.loggers = settings, Path(folder), device, loggers
        parts = read_sections(settings, SECTIONS)
        parts["data"] = dataclasses.asdict(parts["data"])
        paths = {name: str(self.folder / name) for name in ("autoencoder", "text", "latents")}
        self.text, self.saved = parts["text"], parts["pipeline"]
        images = read_section("latents", section(DataConfig), {**parts["data"], **parts["latents"]})
        self.latents = EncodeConfig(images, paths["autoencoder"], paths["text"], self.text.length, "none")
        self.autoencoder = _stage(AutoencoderRunConfig, parts, "autoencoder")
        autoencoder = self.autoencoder.autoencoder
        side = self.autoencoder.data.size // 2 ** (len(autoencoder.block_channels) - 1)
        self.flow = _stage(
            FlowRunConfig,
            parts,
            "flow",
            model={
                "image_size": side,
                "image_channels": autoencoder.latent_channels,
                "levels": 0,
                "text_dim": self.text.width,
                "text_len": self.text.length,
            },
            data={"source": "latents", "path": paths["latents"], "size": side},
            training={"text_encoder": paths["text"]},
        )
        self.decoder = _stage(
            DecoderRunConfig,
            parts,
            "decoder",
            decoder={"vae": paths["autoencoder"], "noise_std": self.flow.model.noise_std},
        )

    @classmethod
    def resume(cls, folder: Path, device: str = "cpu", loggers: Collection[str] = ()) -> PipelineTrainer:
        """Return the run in a folder.

        Args:
            folder: folder of the run.
            device: torch device that trains.
            loggers: names of `metrics.LOGGERS` that each stage logs to.

        Raises:
            CheckpointError: the folder holds no run.
        """
        if not (path := Path(folder) / SETTINGS).exists():
            raise CheckpointError(f"nothing to resume: no {path}")
        return cls(read_settings(path), folder, device, loggers)

    def run(self, quiet: bool = False) -> None:
        """Run the stages that are not finished. Ctrl-C or SIGTERM writes a checkpoint of the current stage.

        Args:
            quiet: whether to hide the progress bars.
        """
        from ..pipelines import without_loading_bars

        write_text(self.folder / SETTINGS, yaml.safe_dump(self.settings, sort_keys=False))
        with without_loading_bars():
            self._train(AutoencoderTrainer, self.autoencoder, "autoencoder", quiet)
            self._make_text_encoder()
            encode(self.latents, self.folder / "latents", self.device, quiet=quiet)
            self._train(FlowTrainer, self.flow, "flow", quiet)
            self._train(DecoderTrainer, self.decoder, "decoder", quiet)
            self._save_pipeline()

    def _train(self, trainer_class: type[Loop], config: RunConfig, name: str, quiet: bool) -> None:
        folder = self.folder / name
        if latest(folder):
            trainer = trainer_class.resume(folder, self.device, self.loggers)
        else:
            trainer = trainer_class(config, folder, self.device, self.loggers)
        trainer.run(quiet)

    def _make_text_encoder(self) -> None:
        folder = self.folder / "text"
        if folder.exists():
            return
        tokenizer = make_tokenizer(distinct_captions(load(self.latents.data)))
        with write_folder(folder) as temporary, standard_defaults():
            save_text(tokenizer, self.text.build(len(tokenizer)), temporary)

    def _save_pipeline(self) -> None:
        """Write the folder `pipeline`, with weights in float16."""
        from ..pipelines import FlowModel, STARFlowPipeline

        flow = FlowModel.from_flow(Flow.from_pretrained(self.folder / "flow", dtype=torch.float16))
        tokenizer, text_encoder = load_text(self.folder / "flow")
        vae = load_vae(self.folder / "decoder")
        for module in (text_encoder, vae):
            # The methods of diffusers and transformers warn.
            torch.nn.Module.to(module, torch.float16)
        flow.notice, guidance, denoise = self.saved.notice, self.saved.guidance, self.saved.denoise
        pipe = STARFlowPipeline(flow, vae, text_encoder, tokenizer, denoise=denoise, guidance=guidance)
        with write_folder(self.folder / "pipeline", overwrite=True) as temporary:
            pipe.save_pretrained(temporary)


def _stage(kind: type[RunConfig], parts: dict[str, Any], name: str, **derived: dict[str, Any]) -> Any:
    """Return the settings of a stage.

    Args:
        kind: class of the settings.
        parts: settings of the pipeline.
        name: section of the stage.
        derived: settings that follow from other stages, by section.

    Raises:
        ConfigError: a setting is unknown, missing, out of range or derived.
    """
    given = {"data": {}, **parts[name]}
    for key, value in given.items():
        if not isinstance(value, dict):
            raise ConfigError(f"{name}: {key} is not a mapping")
    if "data" not in derived:
        given["data"] = {**parts["data"], **given["data"]}
    for key, values in derived.items():
        if both := sorted(given.get(key, {}).keys() & values.keys()):
            raise ConfigError(f"{name}.{key}: {', '.join(both)} follows from other stages, leave it out")
        given[key] = {**given.get(key, {}), **values}
    return read_section(name, kind.from_dict, given)
