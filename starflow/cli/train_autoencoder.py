"""Command `starflow train-autoencoder`."""

from __future__ import annotations

import argparse
from typing import Any

from ..training.autoencoder import AutoencoderTrainer
from .common import Parser
from .runs import run_arguments, run_loop

EXAMPLE = "starflow train-autoencoder --config autoencoder.yaml --out runs/autoencoder"


def add_arguments(parser: Parser) -> None:
    """Add the arguments of this command."""
    run_arguments(parser, "autoencoder, data and training")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train an autoencoder; return the report of the run."""
    return run_loop(args, AutoencoderTrainer, {})
