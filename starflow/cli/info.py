"""starflow info"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from starflow_kernels import backends

from ..inversion.solvers import Measurement
from ..models.checkpoint import resolve
from ..models.flow import Flow
from .common import Parser, device

HELP = "describe a checkpoint and this machine"
EXAMPLE = "starflow info --checkpoint runs/digits"


def add_arguments(parser: Parser) -> None:
    """The arguments of this command."""
    parser.add_argument("--checkpoint", default="digits", help="folder, or the bundled 'digits' (default)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print what the checkpoint is and what this machine runs."""
    flow = Flow.from_pretrained(args.checkpoint, device(args.device))
    rows, columns = flow.config.grid
    measurements = flow.calibration.measurements if flow.calibration else ()
    results = {
        "checkpoint": str(resolve(args.checkpoint)),
        "parameters": sum(p.numel() for p in flow.parameters()),
        "tokens": rows * columns,
        "token_dim": flow.config.token_dim,
        "config": flow.config.to_dict(),
        "calibration": [_measured(measurement) for measurement in measurements],
        "backends": backends(),
    }
    for name, value in results.items():
        print(f"{name}: {json.dumps(value) if isinstance(value, (dict, list)) else value}")
    return results


def _measured(measurement: Measurement) -> dict[str, Any]:
    times = {"sequential_seconds": measurement.sequential_seconds, "seconds": measurement.seconds}
    solvers = [str(block.choice) for block in measurement.blocks]
    return {**dataclasses.asdict(measurement.conditions), "machine": measurement.machine, **times, "solvers": solvers}
