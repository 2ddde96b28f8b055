"""What the commands share: the parser, argument types, devices and dtypes."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn

import torch

from ..errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class Parser(argparse.ArgumentParser):
    """Parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def checkpoint_arguments(parser: Parser, batch_size: str = "256", auto: bool = False) -> None:
    """Arguments of a command that runs a checkpoint; batch_size: the default, in words where it has no number. auto:
    whether it may be "auto"."""
    parser.add_argument("--checkpoint", default="digits", help="folder, or the bundled 'digits' (default)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the weights")
    parser.add_argument("--seed", type=non_negative, default=0, help="of all random numbers (default 0)")
    number = int(batch_size) if batch_size.isdecimal() else None
    help = f"images at a time (default {batch_size})"
    parser.add_argument("--batch-size", type=positive_or_auto if auto else positive, default=number, help=help)


def positive(text: str) -> int:
    """argparse type: an integer of at least 1."""
    return _integer(text, 1)


def positive_or_auto(text: str) -> int | str:
    """argparse type: an integer of at least 1, or "auto"."""
    return text if text == "auto" else positive(text)


def byte_count(text: str) -> int:
    """argparse type: bytes, as a number with the unit KB, MB, GB (1000s) or KiB, MiB, GiB (1024s), or without."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]i?)?B?", text.strip(), re.IGNORECASE)
    if not found or not (value := float(found[1])):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 8GB or 512MiB")
    unit = (found[2] or "").upper()
    return int(value * (1024 if unit.endswith("I") else 1000) ** " KMGT".index(unit[:1] or " "))


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
