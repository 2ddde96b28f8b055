"""starflow train"""

from __future__ import annotations

import argparse
from typing import Any

from ..training.flow import Trainer
from .common import Parser
from .runs import run_arguments, run_loop

HELP = "train a flow"
EXAMPLE = "starflow train --preset digits --out runs/digits"


def add_arguments(parser: Parser) -> None:
    """The arguments of this command."""
    run_arguments(parser, "model, data and training")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="bfloat16: autocast (default: the settings')")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train; interrupted, say how to continue."""
    changes = [f"training.bf16={'true' if args.dtype == 'bfloat16' else 'false'}"] if args.dtype else []
    return run_loop(args, Trainer, changes)
