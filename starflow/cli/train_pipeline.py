"""Command `starflow train-pipeline`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..settings import override, presets
from ..training.config import SETTINGS
from ..training.parallel import refuse_processes
from ..training.pipeline import SEEDED, PipelineTrainer
from .common import Parser, device, interrupted_by_sigterm
from .runs import RESUMED, loggers, new_run, run_arguments

KIND = "pipeline"
EXAMPLE = "starflow train-pipeline --preset emoji --out runs/emoji"


def add_arguments(parser: Parser) -> None:
    """Add the arguments of this command."""
    run_arguments(parser, "data, autoencoder, text, latents, flow, decoder and pipeline", presets(KIND))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train the stages that are not finished; return the folder of the pipeline."""
    refuse_processes(PipelineTrainer.COMMAND)
    if args.resume:
        if args.set or args.out or args.seed is not None:
            raise ConfigError(RESUMED)
        trainer = PipelineTrainer.resume(Path(args.resume), device(args.device), loggers(args))
    else:
        settings, folder = new_run(args, lambda folder: (folder / SETTINGS).exists(), KIND)
        if args.seed is not None:
            override(settings, [f"{section}.seed={args.seed}" for section in SEEDED])
        trainer = PipelineTrainer(settings, folder, device(args.device), loggers(args))
    start = time.perf_counter()
    try:
        with interrupted_by_sigterm():
            trainer.run(args.quiet)
    except KeyboardInterrupt:
        print(f"stopped; continue with: starflow {trainer.COMMAND} --resume {trainer.folder}", file=sys.stderr)
        raise
    seconds, pipeline = time.perf_counter() - start, trainer.folder / "pipeline"
    print(f"{pipeline}: {seconds:.0f} s")
    return {"folder": str(pipeline), "seconds": seconds}
