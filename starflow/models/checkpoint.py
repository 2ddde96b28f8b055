"""Weights as safetensors with the configuration beside them, loaded strictly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..errors import CheckpointError, ConfigError
from ..inversion.solver_files import read_calibration, save_calibration
from ..io.files import write_atomically, write_text
from ..io.weights import read_weights
from .config import FlowConfig

if TYPE_CHECKING:
    from .flow import Flow

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
PIPELINE_INDEX = "model_index.json"  # of a folder that holds a whole pipeline
BUNDLED = Path(__file__).parents[1] / "checkpoints"


def save_pretrained(flow: Flow, folder: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Write config.json and model.safetensors, each atomically, and the calibration; `state` in place of the flow's own
    weights."""
    folder = Path(folder)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in (state or flow.state_dict()).items()}

    def write(path: Path) -> None:
        try:
            save_file(tensors, path)
        except SafetensorError as error:
            raise OSError(str(error)) from None

    write_atomically(folder / WEIGHTS, write)
    write_text(folder / CONFIG, json.dumps(flow.config.to_dict(), indent=2) + "\n")
    save_calibration(flow.calibration, folder)


def from_pretrained(
    kind: type[Flow], folder: str | Path, device: str | torch.device, dtype: torch.dtype | None
) -> Flow:
    """Read what `save_pretrained` wrote, or the same in shards; a folder's path, or the name of a bundled checkpoint.

    Raises CheckpointError when a file is missing or damaged, or when names, shapes or dtypes of the weights differ from
    those of the configuration.
    """
    folder = resolve(folder)
    try:
        config = FlowConfig.load(folder / CONFIG)
    except ConfigError as error:
        raise CheckpointError(f"checkpoint {folder}: {error}") from None
    state = read_weights(folder)
    with torch.device("meta"):
        flow = kind(config)
    check_state(flow, state, folder / WEIGHTS)
    flow.load_state_dict(state, assign=True)
    flow.calibration = read_calibration(folder, config)
    return flow.to(device=device, dtype=dtype).eval()


def check_state(flow: Flow, state: dict[str, torch.Tensor], source: Path) -> None:
    """Raise CheckpointError unless the names and shapes in `state` are those of the flow."""
    check_tensors(state, {name: tuple(tensor.shape) for name, tensor in flow.state_dict().items()}, source)


def check_tensors(
    state: dict[str, torch.Tensor], expected: dict[str, tuple[int, ...]], source: Path, asking: str = f"its {CONFIG}"
) -> None:
    """Raise CheckpointError unless the names and shapes in `state` are the expected ones; asking: what expects them."""
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


def resolve(folder: str | Path) -> Path:
    """Folder of a checkpoint, or of a bundled one by its name."""
    path = Path(folder)
    if not path.exists() and (BUNDLED / path / CONFIG).exists():
        return BUNDLED / path
    if not (path / CONFIG).exists():
        names = sorted(path.parent.name for path in BUNDLED.glob(f"*/{CONFIG}"))
        raise CheckpointError(f"no checkpoint at {path} ({CONFIG} is not there); bundled: {', '.join(names) or 'none'}")
    return path
