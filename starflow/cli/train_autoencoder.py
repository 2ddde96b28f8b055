"""starflow train-autoencoder"""

from __future__ import annotations

import argparse
from typing import Any

from ..training.autoencoder import AutoencoderTrainer
from .common import Parser
from .runs import run_arguments, run_loop

KIND = "autoencoder"
HELP = "train a small autoencoder for the latents of a flow"
EXAMPLE = "starflow train-autoencoder --preset digits --out runs/autoencoder"


def add_arguments(parser: Parser) -> None:
    """The arguments of this command."""
    run_arguments(parser, "autoencoder, data and training", KIND)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train; interrupted, say how to continue."""
    return run_loop(args, AutoencoderTrainer, [], KIND)
