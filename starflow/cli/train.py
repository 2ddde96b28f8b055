"""starflow train"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..loop import STATE
from ..settings import PRESETS, override, presets, read_settings
from ..training import RunConfig, Trainer
from .common import Parser, device, non_negative

HELP = "train a flow"
EXAMPLE = "starflow train --preset digits --out runs/digits"


def add_arguments(parser: Parser) -> None:
    """The arguments of this command."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--preset", choices=presets(), help="settings that come with the package")
    source.add_argument("--config", metavar="FILE", help="YAML with the sections model, data and training")
    source.add_argument("--resume", metavar="RUN", help="folder of a run to continue at its last checkpoint")
    parser.add_argument("--set", metavar="SECTION.NAME=VALUE", action="append", default=[], help="change a setting")
    parser.add_argument("--out", metavar="RUN", help="folder for checkpoint, metrics and sample grids")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="bfloat16: autocast (default: the settings')")
    parser.add_argument("--seed", type=non_negative, help="of all random numbers (default: the settings')")
    parser.add_argument("--tensorboard", action="store_true", help="log to RUN/tensorboard too")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train; interrupted, say how to continue."""
    if args.resume:
        if args.set or args.out or args.seed is not None or args.dtype:
            raise ConfigError("--resume continues with the settings of the run: drop --set, --out, --seed and --dtype")
        trainer = Trainer.resume(Path(args.resume), device(args.device), args.tensorboard)
    else:
        settings = read_settings(PRESETS / f"{args.preset}.yaml" if args.preset else Path(args.config))
        override(settings, args.set)
        if args.seed is not None:
            override(settings, [f"training.seed={args.seed}"])
        if args.dtype:
            override(settings, [f"training.bf16={'true' if args.dtype == 'bfloat16' else 'false'}"])
        folder = Path(args.out or f"runs/{args.preset or Path(args.config).stem}")
        if (folder / STATE).exists():
            raise ConfigError(f"{folder} holds a run: continue it with --resume {folder}, or choose another --out")
        trainer = Trainer(RunConfig.from_dict(settings), folder, device(args.device), args.tensorboard)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    start, first = time.perf_counter(), trainer.step
    try:
        trainer.run(args.quiet)
    except KeyboardInterrupt:
        print(
            f"stopped at step {trainer.step}; continue with: starflow train --resume {trainer.folder}", file=sys.stderr
        )
        raise
    seconds = time.perf_counter() - start
    print(f"{trainer.folder}: {trainer.step} steps, {seconds:.0f} s")
    last = trainer.metrics[-1] if trainer.metrics else {}
    return {"folder": str(trainer.folder), "steps": trainer.step - first, "seconds": seconds, "last": last}
