"""Plan of a training run, which `starflow train --dry-run` prints."""

from __future__ import annotations

import argparse
import dataclasses
import math
from typing import Any

from ..errors import ConfigError
from ..training.flow import FlowRunConfig
from ..training.plan import Machine, Plan, plan
from .common import Parser, positive
from .runs import change_settings, run_settings

UNITS = ("", "k", "M", "B")


def dry_run_arguments(parser: Parser) -> None:
    """Add the arguments of a dry run."""
    group = parser.add_argument_group("dry run")
    default = Machine()
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="Print parameters, memory, work and time of the run; train nothing and read no data. Default: train.",
    )
    group.add_argument("--gpus", type=positive, metavar="N", help=f"Number of GPUs. Default: {default.gpus}.")
    group.add_argument(
        "--memory-gb", type=_number, metavar="X", help=f"Memory per GPU in GB. Default: {default.memory_gb:g}."
    )
    group.add_argument(
        "--utilisation",
        type=_number,
        metavar="X",
        help=f"Expected fraction of the peak of a GPU. Default: {default.utilisation:g}.",
    )
    group.add_argument(
        "--device-tflops",
        type=_number,
        metavar="X",
        help="Peak of a GPU in 1e12 operations per second. With it, training logs the fraction that is reached. "
        f"Default: {default.tflops:g} for a dry run, which is bfloat16 on an H100; unknown in training.",
    )


def machine_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Return the flags that describe devices, with their values."""
    return {f"--{name.replace('_', '-')}": getattr(args, name) for name in ("gpus", "memory_gb", "utilisation")}


def dry_run(args: argparse.Namespace, changes: dict[tuple[str, str], Any]) -> dict[str, Any]:
    """Print the plan of a run and return it.

    Args:
        args: the parsed arguments.
        changes: values of settings, by section and name, that result from other arguments; None changes nothing.

    Raises:
        ConfigError: a setting or a number is out of range, or a run is resumed.
    """
    if args.resume:
        raise ConfigError("--dry-run plans a new run: give --preset or --config in place of --resume")
    given = {
        "gpus": args.gpus, "memory_gb": args.memory_gb, "utilisation": args.utilisation, "tflops": args.device_tflops,
    }  # fmt: skip
    machine = Machine(**{name: value for name, value in given.items() if value is not None})
    settings = run_settings(args)
    change_settings(settings, changes)
    config = FlowRunConfig.from_dict(settings)
    found = plan(config, machine)
    print(_text(found, config, machine))
    return {"machine": dataclasses.asdict(machine), **found.to_json()}


def _text(found: Plan, config: FlowRunConfig, machine: Machine) -> str:
    """Return a plan as tables."""
    training, switches = config.training, found.switches
    parts = ", ".join(
        [
            f"{switches.accumulate} pass{'es' if switches.accumulate > 1 else ''} of {found.images} images per GPU",
            "bfloat16" if switches.bf16 else "float32",
            "weights sharded (FSDP)" if switches.parallel == "fsdp" else "all weights on each GPU",
            f"layers {'computed again in' if switches.checkpoint_layers else 'kept for'} the backward pass",
        ]
    )
    run = {
        "parameters": f"{_short(found.parameters)} ({found.parameters:,})",
        "batch": f"{training.batch_size} images: {parts}",
        "work": f"{found.flops / 1e12:,.0f} TFLOP per step",
        "speed": f"{found.tokens_per_second:,.0f} tokens/s, {found.seconds:.3g} s per step, on {machine.gpus} GPUs at "
        f"{machine.utilisation:.0%} of {machine.tflops:g} TFLOP/s",
        "time": f"{found.days:.3g} days for {training.steps:,} steps",
    }
    header = ["block", "parameters", "GFLOP per image", "kept", "kept without checkpoints", "stored", "gathered"]
    rows = [
        [
            str(i), _short(block.parameters), f"{block.flops / 1e9:.1f}", _gb(block.activations),
            _gb(block.without_checkpoints), _gb(block.rank_bytes), _gb(block.gathered_bytes),
        ]
        for i, block in enumerate(found.blocks)
    ]  # fmt: skip
    memory = [[name, _gb(size)] for name, size in found.memory.items() if size] + [["largest at once", _gb(found.peak)]]
    verdict = f"The run fits into {machine.memory_gb:g} GB." if found.fits else (
        f"The run does not fit into {machine.memory_gb:g} GB: {found.advice}."
    )  # fmt: skip
    texts = [
        _table([[name, value] for name, value in run.items()]),
        "Memory per GPU",
        _table(memory),
        "Blocks, per GPU",
        _table([header, *rows]),
        verdict,
    ]
    return "\n".join(texts)


def _table(rows: list[list[str]]) -> str:
    """Return rows with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows) + "\n"


def _gb(size: int) -> str:
    """Return a number of bytes in GB."""
    return f"{size / 1e9:.2f} GB"


def _short(count: int) -> str:
    """Return a count with a unit, such as "3.86 B"."""
    power = min(int(math.log10(max(count, 1)) // 3), len(UNITS) - 1)
    return f"{count / 1000**power:.3g} {UNITS[power]}".rstrip()


def _number(text: str) -> float:
    """Parse a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value
