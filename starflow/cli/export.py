"""Command `starflow export`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..training.flow import export
from .common import Parser, non_empty, refuse

EXAMPLE = "starflow export runs/digits --out digits"


def add_arguments(parser: Parser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("source", type=non_empty, metavar="RUN", help="Folder of the run. Required.")
    parser.add_argument(
        "--out",
        type=non_empty,
        required=True,
        metavar="FOLDER",
        help="Folder to write; it appears only once it is complete. Required.",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Write the weights of a run's last checkpoint; return the folder and the steps that it has taken."""
    refuse({"--device": None if args.device in ("auto", "cpu") else args.device}, "an export runs on the CPU")
    steps = export(Path(args.source), Path(args.out))
    print(f"{args.out}: weights after {steps} steps")
    return {"out": args.out, "steps": steps}
