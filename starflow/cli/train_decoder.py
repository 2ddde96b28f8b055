"""Command `starflow train-decoder`."""

from __future__ import annotations

import argparse
from typing import Any

from ..training.decoder import DecoderTrainer
from .common import Parser, non_empty
from .runs import run_arguments, run_loop

EXAMPLE = "starflow train-decoder --config decoder.yaml --vae runs/autoencoder --out runs/decoder"


def add_arguments(parser: Parser) -> None:
    """Add the arguments of this command."""
    run_arguments(parser, "decoder, data and training")
    parser.add_argument(
        "--vae",
        type=non_empty,
        metavar="FOLDER",
        help="Folder of the autoencoder to start from. Default: decoder.vae of the settings.",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune a decoder; return the report of the run."""
    return run_loop(args, DecoderTrainer, {("decoder", "vae"): args.vae})
