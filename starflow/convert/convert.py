"""Conversion of an upstream .pth file to a checkpoint folder."""

from __future__ import annotations

import fnmatch
import json
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from ..errors import CheckpointError, ConfigError, StarflowError
from ..io.files import check_writable, write_folder, write_text
from ..io.weights import MAX_BYTES, Entry, write_weights
from ..models.checkpoint import CONFIG, NOTICE, check_tensors
from ..models.config import FlowConfig
from .formats import flow_config, read_arguments
from .names import count, dead_buffers, family, upstream_names, upstream_shape, weight_shapes
from .notice import CARD, write_notice_and_card
from .pickles import read_pickle
from .report import Report, is_replaceable

KEPT_DTYPES = (torch.float32, torch.bfloat16)


def convert(
    source: str | Path,
    out: str | Path,
    config: str | Path | None = None,
    dtype: torch.dtype | None = None,
    drop: Iterable[str] = (),
    max_bytes: int = MAX_BYTES,
    overwrite: bool = False,
) -> Report:
    """Convert an upstream checkpoint to a folder with config.json, weights, conversion.json, NOTICE and README.md.

    One tensor at a time is in memory. A conversion that fails leaves nothing behind.

    Args:
        source: upstream .pth file.
        out: folder to write.
        config: upstream YAML. Without it, the name of a TarFlow file gives the settings.
        dtype: dtype of the weights. None keeps float32 and bfloat16, and converts other dtypes to float32.
        drop: patterns of names to leave out, in addition to buffers that no output depends on.
        max_bytes: largest size of a weight file in bytes.
        overwrite: whether to replace a folder that a conversion wrote.

    Raises:
        StarflowError: the file is damaged or malicious, a name or shape does not fit its settings, or `out` is taken.
    """
    started = time.perf_counter()
    source, out = Path(source), Path(out)
    check_target(out, overwrite)
    if not source.exists():
        raise CheckpointError(f"no checkpoint at {source}")
    arguments, settings_source = read_arguments(source, None if config is None else Path(config))
    state, checked = read_pickle(source)
    flow = flow_config(arguments, {name: tuple(tensor.shape) for name, tensor in state.items()}, settings_source)
    kept, dropped = sort_names(flow, state, tuple(drop))
    checked += _check(flow, state, kept, dropped, source, settings_source)
    shapes = weight_shapes(flow)
    entries = [_entry(name, shapes[name], upstream, state[upstream], dtype, source) for name, upstream in kept.items()]
    with write_folder(out, overwrite) as folder:
        files = [CONFIG, *write_weights(folder, entries, max_bytes), NOTICE, CARD]
        write_text(folder / CONFIG, json.dumps(flow.to_dict(), indent=2) + "\n")
        report = Report(
            source=source.name,
            family=family(flow),
            config=flow.to_dict(),
            arguments=arguments,
            parameters=count(shapes),
            kept={upstream: name for name, upstream in kept.items()},
            dropped=dropped,
            checked=[*checked, "every weight is finite"],
            dtype=dtype_names(entry.dtype for entry in entries),
            source_bytes=source.stat().st_size,
            bytes=sum(entry.nbytes for entry in entries),
            files=files,
            seconds=time.perf_counter() - started,
        )
        report.write(folder)
        write_notice_and_card(
            folder, report, dtype_names(state[name].dtype for name in kept.values()), out.resolve().name
        )
    return report


def dtype_names(dtypes: Iterable[torch.dtype]) -> str:
    """Return the sorted distinct names of dtypes, separated by commas.

    Args:
        dtypes: dtypes of tensors.
    """
    return ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes}))


def check_target(out: Path, overwrite: bool) -> None:
    """Check that a conversion may write a folder.

    Args:
        out: folder to write.
        overwrite: whether to replace a folder that a conversion wrote.

    Raises:
        StarflowError: the folder exists and may not be replaced, or the file system refuses.
    """
    if out.exists() and not overwrite:
        raise StarflowError(f"{out} exists already: choose another folder, or --overwrite")
    if out.exists() and not is_replaceable(out):
        raise StarflowError(f"{out} holds other files than those of a conversion and is not overwritten")
    check_writable(out.parent)


def sort_names(flow: FlowConfig, names: Iterable[str], drop: tuple[str, ...]) -> tuple[dict[str, str], dict[str, str]]:
    """Sort the names in a file into kept (name in this package -> upstream name) and dropped (upstream name -> reason).

    A name that is neither expected nor dropped is kept unchanged, so that the check of the names reports it.

    Args:
        flow: settings of the flow.
        names: upstream names in the file.
        drop: patterns of names to leave out.
    """
    expected = {upstream: name for name, upstream in upstream_names(flow).items()}
    dead = dead_buffers(flow)
    kept, dropped = {}, {}
    for upstream in names:
        if upstream in expected:
            kept[expected[upstream]] = upstream
        elif upstream in dead:
            dropped[upstream] = "dead buffer"
        elif any(fnmatch.fnmatchcase(upstream, pattern) for pattern in drop):
            dropped[upstream] = "as asked"
        else:
            kept[upstream] = upstream
    order = {name: i for i, name in enumerate(expected.values())}
    return dict(sorted(kept.items(), key=lambda item: order.get(item[0], -1))), dropped


def _check(
    flow: FlowConfig,
    state: dict[str, torch.Tensor],
    kept: dict[str, str],
    dropped: dict[str, str],
    source: Path,
    settings_source: str,
) -> list[str]:
    """Check names, shapes and buffers of a file against its settings, and return the checks in words."""
    names = upstream_names(flow)
    expected = {names[name]: upstream_shape(name, shape) for name, shape in weight_shapes(flow).items()}
    check_tensors({name: state[name] for name in kept.values()}, expected, source, settings_source)
    checks = [f"names and shapes of {len(kept)} weights against {settings_source}"]
    dead = {name: shape for name, shape in dead_buffers(flow).items() if name in dropped}
    for name, shape in dead.items():
        if tuple(state[name].shape) != shape:
            raise ConfigError(
                f"{source}: the buffer {name} is {tuple(state[name].shape)}, {settings_source} asks for {shape}: "
                "other sizes"
            )
    if dead:
        checks.append(f"shapes of {len(dead)} dead buffers")
    # Upstream TarFlow multiplies the noise by sqrt(var). The buffer may be dropped only if var is one.
    if "var" in dropped and family(flow) == "tarflow":
        if not bool((state["var"] == 1).all()):
            raise CheckpointError(f"{source}: var is not one, but the flow does not preserve volume")
        checks.append("var is one")
    return checks


def _entry(
    name: str, shape: tuple[int, ...], upstream: str, tensor: torch.Tensor, dtype: torch.dtype | None, source: Path
) -> Entry:
    target = dtype or (tensor.dtype if tensor.dtype in KEPT_DTYPES else torch.float32)

    def load() -> torch.Tensor:
        converted = tensor.reshape(shape).to(target)
        if not all(bound.isfinite() for bound in converted.aminmax()):
            raise CheckpointError(f"{source}: {upstream} is not finite")
        return converted

    return Entry(name, shape, target, load)
