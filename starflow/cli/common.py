"""Parts shared by the commands: the parser, argument types, devices and dtypes."""

from __future__ import annotations

import argparse
import re
from typing import Any, NoReturn

import torch

from ..errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class Parser(argparse.ArgumentParser):
    """Parser that reports an error in one line."""

    def __init__(self, **options: Any):
        super().__init__(add_help=False, **options)
        self.add_argument("-h", "--help", action="help", help="Show this help and exit.")

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def checkpoint_arguments(parser: Parser, batch_size: str = "256", auto: bool = False) -> None:
    """Add the arguments of a command that runs a checkpoint.

    Args:
        parser: the command's parser.
        batch_size: default number of images per batch, or a text that describes the default. With a text, the parsed
            default is None.
        auto: whether the batch size may be "auto".
    """
    parser.add_argument(
        "--checkpoint",
        default="digits",
        metavar="FOLDER",
        help="Folder of the checkpoint, or the name of a bundled one. Default: digits, which is bundled.",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="Data type of the weights in memory. Default: float32."
    )
    seed_argument(parser)
    parser.add_argument(
        "--batch-size",
        type=positive_or_auto if auto else positive,
        default=int(batch_size) if batch_size.isdecimal() else None,
        metavar="N",
        help=f"Number of images per batch. Default: {batch_size}.",
    )


def seed_argument(parser: Parser, default: int | None = 0, described: str = "0") -> None:
    """Add --seed.

    Args:
        parser: the command's parser.
        default: the parsed default.
        described: the default in the help text.
    """
    parser.add_argument(
        "--seed",
        type=non_negative,
        default=default,
        metavar="N",
        help=f"Seed of all random numbers. Default: {described}.",
    )


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    return _integer(text, 1)


def positive_or_auto(text: str) -> int | str:
    """Parse an integer of at least 1, or "auto"."""
    return text if text == "auto" else positive(text)


def byte_count(text: str) -> int:
    """Parse a number of bytes: 8GB (units of 1000), 512MiB (units of 1024) or a plain number."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]i?)?B?", text.strip(), re.IGNORECASE)
    if not found or not (value := float(found[1])):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 8GB or 512MiB")
    unit = (found[2] or "").upper()
    return int(value * (1024 if unit.endswith("I") else 1000) ** " KMGT".index(unit[:1] or " "))


def non_negative(text: str) -> int:
    """Parse an integer of at least 0."""
    return _integer(text, 0)


def _integer(text: str, low: int) -> int:
    """Parse an integer of at least `low`."""
    if not text.lstrip("-").isdecimal() or int(text) < low:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {low}")
    return int(text)


def device(name: str) -> str:
    """Return the name of a device that torch can use; "auto" is CUDA if there is a GPU, else the CPU.

    Raises:
        ConfigError: torch cannot use the device.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, dtype=torch.float32, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return name
