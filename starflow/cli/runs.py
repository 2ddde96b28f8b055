"""What the commands that train share: settings, resuming, and the report."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..settings import PRESETS, override, presets, read_settings
from ..training.loop import STATE, Loop
from .common import Parser, device, non_negative


def run_arguments(parser: Parser, sections: str, kind: str = "") -> None:
    """Arguments of a command that trains from settings with the named sections, presets of a kind among them."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--preset", choices=presets(kind), help="settings that come with the package")
    source.add_argument("--config", metavar="FILE", help=f"YAML with the sections {sections}")
    source.add_argument("--resume", metavar="RUN", help="folder of a run to continue at its last checkpoint")
    parser.add_argument("--set", metavar="SECTION.NAME=VALUE", action="append", default=[], help="change a setting")
    parser.add_argument("--out", metavar="RUN", help="folder for checkpoint, metrics and sample grids")
    parser.add_argument("--seed", type=non_negative, help="of all random numbers (default: the settings')")
    parser.add_argument("--tensorboard", action="store_true", help="log to RUN/tensorboard too")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run_loop(args: argparse.Namespace, trainer_class: type[Loop], changes: list[str], kind: str = "") -> dict[str, Any]:
    """Train, new or resumed; interrupted, say how to continue. changes: assignments of other arguments."""
    if args.resume:
        if args.set or args.out or args.seed is not None or changes:
            raise ConfigError("--resume continues with the settings of the run: drop --set, --out, --seed and --dtype")
        trainer = trainer_class.resume(Path(args.resume), device(args.device), args.tensorboard)
    else:
        settings = read_settings(PRESETS / kind / f"{args.preset}.yaml" if args.preset else Path(args.config))
        override(settings, [*args.set, *changes])
        if args.seed is not None:
            override(settings, [f"training.seed={args.seed}"])
        folder = Path(args.out or f"runs/{args.preset or Path(args.config).stem}")
        if (folder / STATE).exists():
            raise ConfigError(f"{folder} holds a run: continue it with --resume {folder}, or choose another --out")
        config = trainer_class.CONFIG.from_dict(settings)
        trainer = trainer_class(config, folder, device(args.device), args.tensorboard)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    start, first = time.perf_counter(), trainer.step
    try:
        trainer.run(args.quiet)
    except KeyboardInterrupt:
        resume = f"starflow {trainer.COMMAND} --resume {trainer.folder}"
        print(f"stopped at step {trainer.step}; continue with: {resume}", file=sys.stderr)
        raise
    seconds = time.perf_counter() - start
    print(f"{trainer.folder}: {trainer.step} steps, {seconds:.0f} s")
    last = trainer.metrics[-1] if trainer.metrics else {}
    return {"folder": str(trainer.folder), "steps": trainer.step - first, "seconds": seconds, "last": last}
