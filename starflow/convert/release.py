"""A checkpoint folder of ours to a .pth that the released code loads strictly."""

from __future__ import annotations

import collections
import json
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from ..errors import CheckpointError
from ..io.files import write_folder, write_text
from ..io.weights import read_weights
from ..models.checkpoint import CONFIG, check_tensors, resolve
from ..models.config import FlowConfig
from .convert import check_target
from .formats import write_arguments
from .names import count, dead_buffers, family, make_buffer, our_shapes, released_names, released_shape
from .report import Report

# Of a pipeline of diffusers: the folder of the flow, and the name of its weights.
TRANSFORMER, STEM = "transformer", "diffusion_pytorch_model"


def release(source: str | Path, out: str | Path, overwrite: bool = False) -> Report:
    """Write the weights of a folder as a .pth of the released code, with its settings as a YAML beside it.

    source: a checkpoint folder or bundled checkpoint of ours, or a pipeline folder of diffusers. The weights keep their
    dtype. Raises ConfigError for a flow that the released code has no settings for.
    """
    started = time.perf_counter()
    out = Path(out)
    check_target(out, overwrite)
    folder, flow, state = _read(Path(source))
    shapes, names = our_shapes(flow), released_names(flow)
    check_tensors(state, shapes, folder)
    theirs = {names[ours]: released_shape(ours, shape) for ours, shape in shapes.items()}
    arguments = write_arguments(flow, theirs)
    buffers = dead_buffers(flow)
    weights = collections.OrderedDict((names[ours], state[ours].reshape(theirs[names[ours]])) for ours in names)
    weights.update((name, make_buffer(name, shape)) for name, shape in buffers.items())
    name = _file_name(Path(source).resolve().name, flow)
    with write_folder(out, overwrite) as target:
        try:
            torch.save(weights, target / name)
        except RuntimeError as error:
            # How torch reports a full disk.
            raise OSError(str(error).splitlines()[0]) from None
        write_text(target / f"{Path(name).stem}.yaml", _yaml(arguments))
        report = Report(
            source=Path(source).name,
            family=family(flow),
            config=flow.to_dict(),
            arguments=arguments,
            parameters=count(shapes),
            kept={theirs: ours for ours, theirs in names.items()},
            dropped={},
            checked=[f"names and shapes of {len(names)} weights", "the settings mean the same flow"],
            dtype=", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()})),
            source_bytes=sum(tensor.nbytes for tensor in state.values()),
            bytes=(target / name).stat().st_size,
            files=[name, f"{Path(name).stem}.yaml"],
            seconds=time.perf_counter() - started,
        )
        report.write(target)
    return report


def _read(source: Path) -> tuple[Path, FlowConfig, dict[str, torch.Tensor]]:
    folder = source / TRANSFORMER if (source / TRANSFORMER / CONFIG).exists() else resolve(source)
    try:
        fields = json.loads((folder / CONFIG).read_text())
        config = FlowConfig.from_dict({name: value for name, value in fields.items() if not name.startswith("_")})
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None
    stems = [stem for stem in ("model", STEM) if list(folder.glob(f"{stem}*.safetensors"))]
    return folder, config, read_weights(folder, stems[0] if stems else "model")


def _file_name(stem: str, config: FlowConfig) -> str:
    """Name that the released training gives; stem: what stands there for the data set."""
    if len(set(config.layers)) > 1 or family(config) == "starflow":
        return f"{stem}.pth"
    noise = f"{config.noise_std:.2f}" if config.noise_std else "uniform"
    sizes = f"{config.patch_size}_{config.channels}_{len(config.layers)}_{config.layers[0]}"
    return f"{stem}_model_{sizes}_{noise}.pth"


def _yaml(arguments: dict[str, Any]) -> str:
    """A YAML of the released kind. Its img_size is that of the flow: there is no autoencoder in it yet."""
    values = {
        name: " ".join(map(str, value)) if isinstance(value, list) else value for name, value in arguments.items()
    }
    for name, value in arguments.items():
        if isinstance(value, list) and len(value) == 1:
            values[name] = value[0]
    return yaml.safe_dump({"arguments": [{name: value} for name, value in values.items()]}, sort_keys=False)
