"""A released .pth to a checkpoint folder of ours."""

from __future__ import annotations

import fnmatch
import json
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from ..errors import CheckpointError, ConfigError, StarflowError
from ..io.files import write_folder, write_text
from ..io.weights import MAX_SHARD, Entry, write_weights
from ..models.checkpoint import CONFIG, check_tensors
from ..models.config import FlowConfig
from .formats import flow_config, read_arguments
from .names import DENOISER, count, dead_buffers, family, our_shapes, released_names, released_shape
from .pickles import read_pickle
from .report import Report, replaceable

KEPT_DTYPES = (torch.float32, torch.bfloat16)


def convert(
    source: str | Path,
    out: str | Path,
    config: str | Path | None = None,
    dtype: torch.dtype | None = None,
    drop: Iterable[str] = (),
    max_shard: int = MAX_SHARD,
    overwrite: bool = False,
) -> Report:
    """Convert a released checkpoint into the folder `out`: config.json, weights, conversion.json.

    config: YAML of the released kind; without it the name of a TarFlow file says what it is. dtype: of the weights,
    None keeps float32 and bfloat16 and makes float32 of others. drop: patterns of names that are left out beside the
    dead buffers. max_shard: bytes of a file. overwrite: replace a folder that a conversion wrote.

    One tensor at a time is in memory, the rest stays in the file. A file that is damaged, malicious, or does not fit
    its configuration name by name and shape by shape raises StarflowError and leaves nothing behind.
    """
    started = time.perf_counter()
    source, out = Path(source), Path(out)
    check_target(out, overwrite)
    if not source.exists():
        raise CheckpointError(f"no checkpoint at {source}")
    arguments, where = read_arguments(source, None if config is None else Path(config))
    state, checked = read_pickle(source)
    flow = flow_config(arguments, {name: tuple(tensor.shape) for name, tensor in state.items()}, where)
    kept, dropped = sort_names(flow, state, bool(arguments.get("learnable_self_denoiser")), tuple(drop))
    checked += _check(flow, state, kept, dropped, source, where)
    shapes = our_shapes(flow)
    entries = [_entry(ours, shapes[ours], released, state[released], dtype, source) for ours, released in kept.items()]
    with write_folder(out, overwrite) as folder:
        files = [CONFIG, *write_weights(folder, entries, max_shard)]
        write_text(folder / CONFIG, json.dumps(flow.to_dict(), indent=2) + "\n")
        report = Report(
            source=source.name,
            family=family(flow),
            config=flow.to_dict(),
            arguments=arguments,
            parameters=count(shapes),
            kept={released: ours for ours, released in kept.items()},
            dropped=dropped,
            checked=[*checked, "every weight is finite"],
            dtype=", ".join(sorted({str(entry.dtype).removeprefix("torch.") for entry in entries})),
            source_bytes=source.stat().st_size,
            bytes=sum(entry.nbytes for entry in entries),
            files=files,
            seconds=time.perf_counter() - started,
        )
        report.write(folder)
    return report


def check_target(out: Path, overwrite: bool) -> None:
    """Raise StarflowError unless a conversion may write the folder."""
    if out.exists() and not overwrite:
        raise StarflowError(f"{out} exists already: choose another folder, or --overwrite")
    if out.exists() and not replaceable(out):
        raise StarflowError(f"{out} holds other files than those of a conversion and is not overwritten")


def sort_names(
    flow: FlowConfig, names: Iterable[str], denoiser: bool, drop: tuple[str, ...]
) -> tuple[dict[str, str], dict[str, str]]:
    """Released names of a file: those of the flow's weights, ours -> released, and those to drop, with the reason.

    Names of neither kind count as weights, under their own name, so that the check of names meets them.
    """
    released = {theirs: ours for ours, theirs in released_names(flow).items()}
    dead = dead_buffers(flow)
    kept, dropped = {}, {}
    for name in names:
        if name in released:
            kept[released[name]] = name
        elif name in dead:
            dropped[name] = "dead buffer"
        elif denoiser and name.startswith(DENOISER):
            dropped[name] = "STARFlow-V's denoiser: no part of the flow"
        elif any(fnmatch.fnmatchcase(name, pattern) for pattern in drop):
            dropped[name] = "as asked"
        else:
            kept[name] = name
    order = {ours: i for i, ours in enumerate(released.values())}
    return dict(sorted(kept.items(), key=lambda item: order.get(item[0], -1))), dropped


def _check(
    flow: FlowConfig,
    state: dict[str, torch.Tensor],
    kept: dict[str, str],
    dropped: dict[str, str],
    source: Path,
    where: str,
) -> list[str]:
    """Names, shapes and buffers of a file against its configuration; what was checked, in words."""
    names = released_names(flow)
    expected = {names[ours]: released_shape(ours, shape) for ours, shape in our_shapes(flow).items()}
    check_tensors({name: state[name] for name in kept.values()}, expected, source, where)
    checks = [f"names and shapes of {len(kept)} weights against {where}"]
    dead = {name: shape for name, shape in dead_buffers(flow).items() if name in dropped}
    for name, shape in dead.items():
        if tuple(state[name].shape) != shape:
            raise ConfigError(
                f"{source}: the buffer {name} is {tuple(state[name].shape)}, {where} asks for {shape}: other sizes"
            )
    if dead:
        checks.append(f"shapes of {len(dead)} dead buffers")
    # The released TarFlow scales the noise by its root, so it may be dropped as long as it is one.
    if "var" in dropped and family(flow) == "tarflow":
        if not bool((state["var"] == 1).all()):
            raise CheckpointError(f"{source}: var is not one, but the flow does not preserve volume")
        checks.append("var is one")
    return checks


def _entry(
    name: str, shape: tuple[int, ...], released: str, tensor: torch.Tensor, dtype: torch.dtype | None, source: Path
) -> Entry:
    target = dtype or (tensor.dtype if tensor.dtype in KEPT_DTYPES else torch.float32)

    def load() -> torch.Tensor:
        converted = tensor.reshape(shape).to(target)
        if not all(bound.isfinite() for bound in converted.aminmax()):
            raise CheckpointError(f"{source}: {released} is not finite")
        return converted

    return Entry(name, shape, target, load)
