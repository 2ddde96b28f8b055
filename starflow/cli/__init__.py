"""Command line: starflow COMMAND."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path

import torch

from ..errors import StarflowError
from ..io.files import write_text
from . import calibrate, convert, demo, encode, evaluate, info, sample, train, train_autoencoder, train_decoder
from .common import Parser, positive

COMMANDS = {
    "train": train,
    "train-autoencoder": train_autoencoder,
    "train-decoder": train_decoder,
    "encode": encode,
    "sample": sample,
    "eval": evaluate,
    "calibrate": calibrate,
    "info": info,
    "convert": convert,
    "demo": demo,
}


def parser() -> Parser:
    """The parser of all commands."""
    root = Parser(prog="starflow", description="Train, sample and evaluate TarFlow and STARFlow models.")
    commands = root.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.HELP,
            description=f"{command.HELP[0].upper()}{command.HELP[1:]}.",
            epilog=f"example:\n  {command.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=command.run)
        sub.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto takes a GPU where there is one")
        sub.add_argument("--threads", type=positive, help="CPU threads; small models are fastest with 1")
        sub.add_argument("--json", metavar="FILE", help="write what was measured as JSON; - prints it")
        command.add_arguments(sub)
    return root


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 0, or 2 after an error that the user can mend, or 130 when interrupted."""
    args = parser().parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        results = args.run(args)
        if args.json:
            report = {
                "command": args.command,
                "arguments": {k: v for k, v in vars(args).items() if k not in ("run", "command", "json")},
                "versions": {"python": platform.python_version(), "torch": torch.__version__},
                "threads": torch.get_num_threads(),
                "results": results,
            }
            text = json.dumps(report, indent=2, default=str) + "\n"
            if args.json == "-":
                print(text, end="")
            else:
                write_text(Path(args.json), text)
    except StarflowError as error:
        print(f"starflow {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
