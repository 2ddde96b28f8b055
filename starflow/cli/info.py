"""Command `starflow info`."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

import starflow_kernels
from starflow_kernels import __version__, backends

from ..models.calibration import Measurement, duration
from ..models.checkpoint import TRANSFORMER, bundled_names, is_pipeline, locate, pipeline_class, read_config
from ..models.flow import Flow
from ..models.stack import BlockStack
from ..opening import open_model
from ..settings import PRESETS, presets
from .common import Parser, device, non_empty
from .packages import PACKAGES, install_command

EXAMPLE = "starflow info --checkpoint runs/digits"
# Command that trains from presets -> folder of these presets.
PRESET_KINDS = {"train": "", "train-pipeline": "pipeline"}

Table = dict[str, str]


def add_arguments(parser: Parser) -> None:
    """Add the arguments of this command."""
    parser.add_argument(
        "--checkpoint",
        type=non_empty,
        metavar="FOLDER",
        help="Checkpoint to describe as well: its folder, or the name of a bundled one. Default: none.",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print tables of the installation and of this machine's capabilities; return them as data."""
    place = device(args.device)
    described = _describe(args.checkpoint, place) if args.checkpoint else {}
    results = {
        "versions": _versions(),
        "machine": _machine(),
        "backends": backends(),
        "checkpoints": {name: _bundled(name) for name in bundled_names()},
        "presets": {command: _presets(kind) for command, kind in PRESET_KINDS.items()},
        **described,
    }
    _print("Versions", results["versions"])
    _print("Machine", results["machine"])
    public = {op: states for op, states in results["backends"].items() if op in starflow_kernels.__all__}
    _print("Backends of each op, most preferred first; composed means made of other ops", _available(public))
    _print("Backends that cannot run here", unavailable(public))
    _print("Bundled checkpoints", results["checkpoints"])
    for command, table in results["presets"].items():
        _print(f"Presets of `starflow {command}`", table)
    if described:
        _print(f"Checkpoint {args.checkpoint}", _checkpoint_table(described))
    return results


def _print(title: str, table: Table) -> None:
    """Print a table of two columns with a title; print nothing for an empty table."""
    if table:
        width = max(map(len, table))
        print(f"{title}\n" + "".join(f"  {name:<{width}}  {value}\n" for name, value in table.items()))


def _bundled(name: str) -> str:
    """Return the description of a bundled checkpoint. The packages that pipelines need may be missing."""
    if not is_pipeline(name):
        return repr(Flow.from_pretrained(name))
    folder = locate(name)
    with torch.device("meta"):
        flow = Flow(read_config(folder / TRANSFORMER))
    return f"{pipeline_class(folder)} with {flow}"


def _versions() -> Table:
    """Return the version of each package, or the command that installs it if it is missing."""
    found = {"starflow": __version__, "Python": platform.python_version()}
    for package in PACKAGES.values():
        try:
            found[package.name] = importlib.metadata.version(package.name)
        except importlib.metadata.PackageNotFoundError:
            found[package.name] = f"not installed: {install_command(package)}"
    return found


def _machine() -> Table:
    """Return the system, the CPU and the GPUs in words."""
    cpu = f"{_cpu_name()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    found = {"system": platform.platform(), "CPU": cpu, "CPU threads": str(torch.get_num_threads())}
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found[f"GPU {index}"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}"
    if torch.backends.mps.is_available():
        found["GPU"] = "Apple, mps"
    return found if len(found) > 3 else {**found, "GPU": "none that torch sees"}


def _cpu_name() -> str:
    """Return the model name of the CPU."""
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _available(listing: dict[str, dict[str, str]]) -> Table:
    """Return the available backends by op."""
    return {
        op: ", ".join(
            f"{name}{state.removeprefix('available').replace('; ', ' (', 1)}{')' if ';' in state else ''}"
            for name, state in states.items()
            if state.startswith("available")
        )
        for op, states in listing.items()
    }


def unavailable(listing: dict[str, dict[str, str]]) -> Table:
    """Return, by backend, the reasons why it cannot run, each with the ops concerned."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for op, states in listing.items():
        for name, state in states.items():
            if not state.startswith("available"):
                reasons.setdefault((name, state), []).append(op)
    table: Table = {}
    for (name, reason), ops in reasons.items():
        line = f"{reason} ({', '.join(ops)})"
        table[name] = f"{table[name]}; {line}" if name in table else line
    return table


def _presets(kind: str) -> Table:
    """Return the presets of a kind, each with the description in the first line of its file."""
    texts = {name: (PRESETS / kind / f"{name}.yaml").read_text(encoding="utf-8") for name in presets(kind)}
    return {name: text.splitlines()[0].lstrip("# ") for name, text in texts.items()}


def _describe(checkpoint: str, device: str) -> dict[str, Any]:
    """Return size, configuration and measurements of a flow or of a pipeline's flow."""
    model = open_model(checkpoint, device)
    flow = model if isinstance(model, BlockStack) else model.transformer
    tokens, token_dim = flow.config.token_shape
    measurements = flow.calibration.measurements if flow.calibration else ()
    return {
        "checkpoint": str(locate(checkpoint).resolve()),
        "kind": type(model).__name__,
        "parameters": sum(p.numel() for p in flow.parameters()),
        "tokens": tokens,
        "token_dim": token_dim,
        "config": flow.config.to_dict(),
        "calibration": [_measured(measurement) for measurement in measurements],
    }


def _checkpoint_table(described: dict[str, Any]) -> Table:
    """Return the description of a checkpoint as text."""
    table = {
        "folder": described["checkpoint"],
        "kind": described["kind"],
        "parameters": f"{described['parameters']:,}",
        "tokens": f"{described['tokens']} of {described['token_dim']} values",
        **{f"config.{name}": str(value) for name, value in described["config"].items()},
    }
    for measured in described["calibration"]:
        table[f"batch {measured['batch_size']}"] = (
            f"{duration(measured['seconds'])}, sequential {duration(measured['sequential_seconds'])}, on "
            f"{measured['machine']} ({measured['device']}, {measured['threads']} threads, {measured['dtype']})"
        )
    return table


def _measured(measurement: Measurement) -> dict[str, Any]:
    """Return a calibration's measurement as data."""
    times = {"sequential_seconds": measurement.sequential_seconds, "seconds": measurement.seconds}
    solvers = [str(block.choice) for block in measurement.blocks]
    return {**dataclasses.asdict(measurement.conditions), "machine": measurement.machine, **times, "solvers": solvers}
