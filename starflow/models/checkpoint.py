"""Checkpoint folders: weights as safetensors, the configuration and the calibration, read strictly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from ..errors import CheckpointError, ConfigError
from ..io.files import write_text
from ..io.tensors import save_tensors
from ..io.weights import read_weights
from .calibration import Calibration, save_calibration
from .config import FlowConfig, StackConfig
from .token_config import TokenFlowConfig

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
# License notice of weights that derive from others.
NOTICE = "NOTICE"
# File in the folder of a pipeline that names its parts.
PIPELINE_INDEX = "model_index.json"
# Folder of the flow inside a pipeline.
TRANSFORMER = "transformer"
BUNDLED = Path(__file__).parents[1] / "checkpoints"
# Folder inside a training run whose folders have the states of the run.
RUN_CHECKPOINTS = "checkpoints"
# Entry of the configuration that names the kind of flow, as diffusers does; a flow on images may lack it.
KIND = "_class_name"
TOKEN_FLOW = "TokenFlow"
C = TypeVar("C", bound=StackConfig)


def write_checkpoint(
    folder: str | Path, config: StackConfig, state: dict[str, torch.Tensor], calibration: Calibration | None
) -> None:
    """Write a checkpoint folder; each file is written whole or not at all.

    Args:
        folder: the folder.
        config: configuration of the flow.
        state: weights by name.
        calibration: measured speed of solvers, None for none.
    """
    folder = Path(folder)
    save_tensors(state, folder / WEIGHTS)
    kind = {KIND: TOKEN_FLOW} if isinstance(config, TokenFlowConfig) else {}
    write_text(folder / CONFIG, json.dumps({**kind, **config.to_dict()}, indent=2) + "\n")
    save_calibration(calibration, folder)


def remove_checkpoint(folder: Path) -> None:
    """Remove the configuration, without which a folder is no checkpoint, and the weights.

    Args:
        folder: folder that `write_checkpoint` wrote, or one without a checkpoint.
    """
    for name in (CONFIG, WEIGHTS):
        (folder / name).unlink(missing_ok=True)


def read_notice(folder: str | Path) -> str:
    """Return the license notice of a checkpoint folder, empty without one."""
    path = Path(folder) / NOTICE
    return path.read_text(encoding="utf-8") if path.exists() else ""


def save_notice(notice: str, folder: str | Path) -> None:
    """Write a license notice into a checkpoint folder; an empty one writes nothing."""
    if notice:
        write_text(Path(folder) / NOTICE, notice)


def is_token_flow(folder: Path) -> bool:
    """Return whether a checkpoint folder holds a flow on tokens or vectors."""
    try:
        return json.loads((folder / CONFIG).read_bytes()).get(KIND) == TOKEN_FLOW
    except (OSError, ValueError, AttributeError):
        return False


def read_config(folder: Path, kind: type[C] = FlowConfig) -> C:  # type: ignore[assignment]
    """Read the configuration of a checkpoint folder.

    Args:
        folder: the folder.
        kind: expected class of the configuration.

    Raises:
        CheckpointError: there is no such configuration, or it is of another kind of flow.
    """
    if is_token_flow(folder) != (kind is TokenFlowConfig):
        held = "vectors or tokens, a TokenFlow" if kind is FlowConfig else "images, a Flow"
        raise CheckpointError(f"{folder} holds a flow on {held}: starflow.open_model opens it")
    try:
        return kind.load(folder / CONFIG)
    except ConfigError as error:
        raise CheckpointError(f"checkpoint {folder}: {error}") from None


def load_weights(model: nn.Module, folder: Path, mmap: bool = False) -> None:
    """Load the weights of a checkpoint folder, which may be split into several files.

    Args:
        model: the model; its parameters are replaced.
        folder: the checkpoint folder.
        mmap: map the files, see `load_tensors`.

    Raises:
        CheckpointError: A file is missing or damaged, or weights do not fit the model.
    """
    state = read_weights(folder, mmap=mmap)
    check_state(model, state, folder / WEIGHTS)
    model.load_state_dict(state, assign=True)


def check_state(model: nn.Module, state: dict[str, torch.Tensor], source: Path) -> None:
    """Raise CheckpointError unless weights have the names and shapes of a model's; source: their file."""
    check_tensors(state, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, source)


def check_tensors(
    state: dict[str, torch.Tensor], expected: dict[str, tuple[int, ...]], source: Path, asking: str = f"its {CONFIG}"
) -> None:
    """Raise CheckpointError unless weights have the expected names and shapes.

    Args:
        state: weights by name.
        expected: expected shape of each weight.
        source: file of the weights, for the message.
        asking: what expects these shapes, for the message.
    """
    for problem, names in (("lacks", expected.keys() - state.keys()), ("has unknown", state.keys() - expected.keys())):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise CheckpointError(f"{source} {problem} weights {shown}: it does not fit {asking}")
    for name, tensor in state.items():
        if tuple(tensor.shape) != expected[name] or not tensor.is_floating_point():
            raise CheckpointError(
                f"{source}: {name} is {tensor.dtype} {tuple(tensor.shape)}, "
                f"{asking} asks for a floating {expected[name]}"
            )


def bundled_names() -> list[str]:
    """Return the names of the bundled flows and pipelines."""
    return sorted(path.parent.name for file in (CONFIG, PIPELINE_INDEX) for path in BUNDLED.glob(f"*/{file}"))


def is_pipeline(path: str | Path) -> bool:
    """Return whether a folder, or the bundled checkpoint of that name, is a pipeline."""
    return (locate(path) / PIPELINE_INDEX).exists()


def pipeline_class(folder: str | Path) -> str:
    """Name of the class in a folder's model_index.json. Raises CheckpointError if there is none."""
    index = Path(folder) / PIPELINE_INDEX
    try:
        return str(json.loads(index.read_bytes())["_class_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index}: {getattr(error, 'strerror', None) or 'not the index of a pipeline'}") from None


def locate(folder: str | Path) -> Path:
    """Return a folder, which need not exist, given its path or the name of a bundled checkpoint.

    A text that is the name of a bundled checkpoint means that checkpoint. The path of a folder of the same name is
    "./NAME", or a `Path`.

    Args:
        folder: path or name.
    """
    return BUNDLED / folder if isinstance(folder, str) and folder in bundled_names() else Path(folder)


def resolve(folder: str | Path) -> Path:
    """Return the folder of a checkpoint, given its path or the name of a bundled one, see `locate`.

    Raises:
        CheckpointError: there is no checkpoint, or it is a pipeline.
    """
    path = locate(folder)
    if is_pipeline(path):
        raise CheckpointError(f"{folder} is a pipeline, not a flow: starflow.open_model and starflow sample open it")
    if not (path / CONFIG).exists():
        if (path / RUN_CHECKPOINTS).is_dir():
            raise CheckpointError(
                f"{folder} is a run that has not written its weights: starflow export {folder} --out FOLDER does"
            )
        names = ", ".join(bundled_names()) or "none"
        raise CheckpointError(f"no checkpoint at {folder} ({CONFIG} is not there); bundled: {names}")
    return path
