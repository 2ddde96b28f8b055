"""Parts shared by the commands that train: settings, resuming and the report of a run."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..settings import PRESETS, override, read_settings
from ..training.checkpoints import latest
from ..training.loop import Loop
from ..training.metrics import LOGGERS
from ..training.parallel import LostProcessError
from .common import Parser, interrupted_by_sigterm, non_empty, seed_argument
from .options import process_device

RESUMED = "--resume continues with the settings of the run: drop --set, --out, --seed, --dtype and --compile"


def run_arguments(parser: Parser, sections: str, presets: Collection[str] = ()) -> None:
    """Add the arguments of a command that trains from settings.

    Args:
        parser: the command's parser.
        sections: names of the sections of the settings, for the help text.
        presets: names of the command's presets.
    """
    source = parser.add_mutually_exclusive_group(required=True)
    parser.set_defaults(preset=None)
    if presets:
        source.add_argument(
            "--preset",
            choices=presets,
            help="Train with settings that come with the package; `starflow info` describes them.",
        )
    source.add_argument(
        "--config", type=non_empty, metavar="FILE", help=f"Train with a YAML file with the sections {sections}."
    )
    source.add_argument(
        "--resume", type=non_empty, metavar="RUN", help="Continue the run in this folder at its last checkpoint."
    )
    parser.add_argument(
        "--set",
        metavar="SECTION.NAME=VALUE",
        action="append",
        default=[],
        help="Change one setting, such as training.steps=100; may be repeated. Default: no change.",
    )
    parser.add_argument(
        "--out",
        type=non_empty,
        metavar="RUN",
        help="Folder for the checkpoint, the metrics and grids of samples. Default: runs/NAME, NAME being that of the "
        "preset or of the settings file.",
    )
    seed_argument(parser, None, "the one in the settings")
    parser.add_argument(
        "--tensorboard", action="store_true", help="Log the metrics to RUN/tensorboard as well. Default: off."
    )
    parser.add_argument(
        "--wandb", action="store_true", help="Log the metrics to Weights & Biases as well. Default: off."
    )
    parser.add_argument(
        "--quiet", action="store_true", help="Show no progress bar. Default: show one if standard error is a terminal."
    )


def loggers(args: argparse.Namespace) -> list[str]:
    """Return the names of the loggers that are asked for."""
    return [name for name in LOGGERS if getattr(args, name)]


def run_settings(args: argparse.Namespace, kind: str = "") -> dict[str, Any]:
    """Return the settings of a preset or a file, with the changes by --set.

    Args:
        args: the parsed arguments.
        kind: folder of the command's presets inside the folder of all presets.

    Raises:
        ConfigError: the settings are unreadable.
    """
    settings = read_settings(PRESETS / kind / f"{args.preset}.yaml" if args.preset else Path(args.config))
    override(settings, args.set)
    return settings


def change_settings(settings: dict[str, Any], changes: dict[tuple[str, str], Any]) -> None:
    """Change settings in place.

    Args:
        settings: mapping of sections.
        changes: new values by section and name; None changes nothing.
    """
    for (section, name), value in changes.items():
        if value is not None and isinstance(settings.get(section), dict):
            settings[section][name] = value


def new_run(args: argparse.Namespace, holds_run: Callable[[Path], Any], kind: str = "") -> tuple[dict[str, Any], Path]:
    """Return the settings of a new run, with the changes by --set, and its folder.

    Args:
        args: the parsed arguments.
        holds_run: whether a folder holds a run.
        kind: folder of the command's presets inside the folder of all presets.

    Raises:
        ConfigError: the settings are unreadable, or the folder holds a run.
    """
    settings = run_settings(args, kind)
    folder = Path(args.out or f"runs/{args.preset or Path(args.config).stem}")
    if holds_run(folder):
        raise ConfigError(f"{folder} holds a run: continue it with --resume {folder}, or choose another --out")
    return settings, folder


def run_loop(
    args: argparse.Namespace, trainer_class: type[Loop], changes: dict[tuple[str, str], Any], tflops: float = 0.0
) -> dict[str, Any]:
    """Train a new or a resumed run; on an interrupt, print the command that continues it.

    Args:
        args: the parsed arguments.
        trainer_class: the loop to run.
        changes: values of settings, by section and name, that result from other arguments; None changes nothing.
        tflops: peak of a device in 1e12 operations per second; 0 if unknown.

    Returns:
        Folder, number of steps, seconds, number of processes, rows of the batch of each, and last metrics of the run.

    Raises:
        ConfigError: arguments contradict each other or the run's folder.
    """
    changes = {key: value for key, value in {**changes, ("training", "seed"): args.seed}.items() if value is not None}
    if args.resume:
        if args.set or args.out or changes:
            raise ConfigError(RESUMED)
        trainer = trainer_class.resume(Path(args.resume), process_device(args.device), loggers(args))
    else:
        settings, folder = new_run(args, latest)
        change_settings(settings, changes)
        config = trainer_class.CONFIG.from_dict(settings)
        trainer = trainer_class(config, folder, process_device(args.device), loggers(args))
    trainer.meter.tflops = tflops
    start, first = time.perf_counter(), trainer.step
    try:
        with interrupted_by_sigterm():
            trainer.run(args.quiet)
    except KeyboardInterrupt:
        if trainer.team.rank == 0:
            print(f"stopped at step {trainer.step}; {_continuation(trainer)}", file=sys.stderr)
        raise
    except LostProcessError as error:
        print(f"starflow {trainer.COMMAND}: error: {error}", file=sys.stderr, flush=True)
        # A thread that writes a checkpoint may wait for a process that waits for this one.
        os._exit(2)
    seconds = time.perf_counter() - start
    if trainer.team.rank:
        args.json = None
        return {}
    print(f"{trainer.folder}: {trainer.step} steps, {seconds:.0f} s")
    last = {**trainer.metrics[-1], **trainer.speeds[-1]} if trainer.metrics else {}
    share = trainer.rows.stop - trainer.rows.start
    return {
        "folder": str(trainer.folder),
        "steps": trainer.step - first,
        "seconds": seconds,
        "processes": trainer.team.count,
        "rows_per_step": [share] * trainer.team.count,
        "last": last,
    }


def _continuation(trainer: Loop) -> str:
    """Return how to continue a run that was stopped: a second interrupt may have stopped the writing."""
    if (path := latest(trainer.folder)) is None:
        return "no checkpoint was written"
    behind = "" if int(path.name) == trainer.step else f"the last checkpoint is of step {int(path.name)}; "
    return f"{behind}continue with: starflow {trainer.COMMAND} --resume {trainer.folder}"
