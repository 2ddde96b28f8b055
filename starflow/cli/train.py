"""Command `starflow train`."""

from __future__ import annotations

import argparse
from typing import Any

from ..settings import presets
from ..training.flow import FlowTrainer
from .common import Parser, refuse
from .dry_run import dry_run, dry_run_arguments, machine_flags
from .runs import run_arguments, run_loop

EXAMPLE = "starflow train --preset digits --out runs/digits"


def add_arguments(parser: Parser) -> None:
    """Add the arguments of this command."""
    run_arguments(parser, "model, data and training", presets())
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="Data type of the computation; bfloat16 uses autocast and keeps the weights in float32. Default: "
        "training.bf16 of the settings.",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        default=None,
        help="Let torch compile the layers, which takes minutes at first. Default: training.compile of the settings.",
    )
    dry_run_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train a flow, or plan its training; return the report."""
    bf16 = None if args.dtype is None else args.dtype == "bfloat16"
    changes = {("training", "bf16"): bf16, ("training", "compile"): args.compile}
    if args.dry_run:
        return dry_run(args, changes)
    refuse(machine_flags(args), "it describes devices for --dry-run")
    return run_loop(args, FlowTrainer, changes, args.device_tflops or 0.0)
