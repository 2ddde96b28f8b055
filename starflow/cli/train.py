"""Command `starflow train`."""

from __future__ import annotations

import argparse
from typing import Any

from ..settings import presets
from ..training.flow import FlowTrainer
from .common import Parser
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


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train a flow; return the report of the run."""
    bf16 = None if args.dtype is None else args.dtype == "bfloat16"
    return run_loop(args, FlowTrainer, {("training", "bf16"): bf16, ("training", "compile"): args.compile})
