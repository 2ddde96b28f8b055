"""What the commands share: the parser, argument types, devices and dtypes."""

from __future__ import annotations

import argparse
from typing import NoReturn

import torch

from ..errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class Parser(argparse.ArgumentParser):
    """Parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def checkpoint_arguments(parser: Parser, batch_size: str = "256") -> None:
    """Arguments of a command that runs a checkpoint; batch_size: the default, in words where it has no number."""
    parser.add_argument("--checkpoint", default="digits", help="folder, or the bundled 'digits' (default)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the weights")
    parser.add_argument("--seed", type=non_negative, default=0, help="of all random numbers (default 0)")
    number = int(batch_size) if batch_size.isdecimal() else None
    help = f"images at a time (default {batch_size})"
    parser.add_argument("--batch-size", type=positive, default=number, help=help)


def positive(text: str) -> int:
    """argparse type: an integer of at least 1."""
    return _integer(text, 1)


def non_negative(text: str) -> int:
    """argparse type: an integer of at least 0."""
    return _integer(text, 0)


def _integer(text: str, low: int) -> int:
    if not text.lstrip("-").isdecimal() or int(text) < low:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {low}")
    return int(text)


def device(name: str) -> str:
    """Name of a device that is there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return name
