"""Export of a checkpoint folder to a .pth file that the upstream code loads strictly."""

from __future__ import annotations

import collections
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from ..io.files import write_folder, write_text, writing
from ..io.weights import read_weights
from ..models.checkpoint import CONFIG, NOTICE, TRANSFORMER, check_tensors, locate, read_config, read_notice, resolve
from ..models.config import FlowConfig
from .convert import check_target, dtype_names
from .formats import write_arguments
from .names import count, dead_buffers, family, make_buffer, upstream_names, upstream_shape, weight_shapes
from .report import Report

# First part of the names of the weight files in that folder.
STEM = "diffusion_pytorch_model"


def export_upstream(source: str | Path, out: str | Path, overwrite: bool = False) -> Report:
    """Write the weights of a folder as an upstream .pth file, and the settings as an upstream YAML.

    The weights keep their dtype. A NOTICE in the folder is copied.

    Args:
        source: checkpoint folder, bundled checkpoint, or pipeline folder of diffusers.
        out: folder to write.
        overwrite: whether to replace a folder that a conversion wrote.

    Raises:
        ConfigError: the upstream code has no settings for the flow.
        StarflowError: the source is damaged, or `out` is taken.
    """
    started = time.perf_counter()
    out = Path(out)
    check_target(out, overwrite)
    folder, flow, state = _read(source)
    shapes, names = weight_shapes(flow), upstream_names(flow)
    check_tensors(state, shapes, folder)
    upstream_shapes = {names[name]: upstream_shape(name, shape) for name, shape in shapes.items()}
    arguments = write_arguments(flow, upstream_shapes)
    weights = collections.OrderedDict(
        (upstream, state[name].reshape(upstream_shapes[upstream])) for name, upstream in names.items()
    )
    weights.update((name, make_buffer(name, shape)) for name, shape in dead_buffers(flow).items())
    name = _file_name(Path(source).resolve().name, flow)
    with write_folder(out, overwrite) as target:
        with writing(target / name):
            torch.save(weights, target / name)
        texts = {f"{Path(name).stem}.yaml": _yaml(arguments)}
        if notice := read_notice(folder):
            texts[NOTICE] = notice
        for file, text in texts.items():
            write_text(target / file, text)
        report = Report(
            source=Path(source).name,
            family=family(flow),
            config=flow.to_dict(),
            arguments=arguments,
            parameters=count(shapes),
            kept={upstream: name for name, upstream in names.items()},
            dropped={},
            checked=[f"names and shapes of {len(names)} weights", "the settings give the same flow"],
            dtype=dtype_names(tensor.dtype for tensor in state.values()),
            source_bytes=sum(tensor.nbytes for tensor in state.values()),
            bytes=(target / name).stat().st_size,
            files=[name, *texts],
            seconds=time.perf_counter() - started,
        )
        report.write(target)
    return report


def _read(source: str | Path) -> tuple[Path, FlowConfig, dict[str, torch.Tensor]]:
    folder = locate(source) / TRANSFORMER
    if not (folder / CONFIG).exists():
        folder = resolve(source)
    config = read_config(folder)
    stems = [stem for stem in ("model", STEM) if list(folder.glob(f"{stem}*.safetensors"))]
    return folder, config, read_weights(folder, stems[0] if stems else "model", mmap=True)


def _file_name(stem: str, config: FlowConfig) -> str:
    """Return the upstream name of the .pth file, with `stem` in place of the data set's name."""
    if len(set(config.layers)) > 1 or family(config) == "starflow":
        return f"{stem}.pth"
    noise = f"{config.noise_std:.2f}" if config.noise_std else "uniform"
    sizes = f"{config.patch_size}_{config.channels}_{len(config.layers)}_{config.layers[0]}"
    return f"{stem}_model_{sizes}_{noise}.pth"


def _yaml(arguments: dict[str, Any]) -> str:
    """Return an upstream YAML. Its img_size is the image size of the flow, because the autoencoder is not included."""
    values = {
        name: " ".join(map(str, value)) if isinstance(value, list) else value for name, value in arguments.items()
    }
    for name, value in arguments.items():
        if isinstance(value, list) and len(value) == 1:
            values[name] = value[0]
    return yaml.safe_dump({"arguments": [{name: value} for name, value in values.items()]}, sort_keys=False)
