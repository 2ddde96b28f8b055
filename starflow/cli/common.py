"""Parts shared by the commands: the parser, argument types, devices and dtypes."""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any, NoReturn

import torch

from ..devices import check_device
from ..errors import ConfigError
from ..seeds import MAX_SEED

MAX_INTEGER = 2**63 - 1
# More threads than this exceed the limits of many systems, which ends the process.
MAX_THREADS = 1024
# Bundled checkpoints of commands that are given none: for classes, and for text where it is bundled.
CHECKPOINT, TEXT_CHECKPOINT = "digits", "emoji"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class Parser(argparse.ArgumentParser):
    """Parser that reports an error in one line."""

    def __init__(self, **options: Any):
        super().__init__(add_help=False, allow_abbrev=False, **options)
        self.add_argument("-h", "--help", action="help", help="Show this help and exit.")

    def parse_known_args(self, args: Sequence[str], namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        """Parse words. argparse of some Python versions takes "--" in "--name=--" for no value and returns a list."""
        for word in args:
            if word.startswith("--") and word.endswith("=--"):
                self.error(f"argument {word[:-3]}: expected one argument")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def default_checkpoint(text: bool) -> str:
    """Return the name of the bundled checkpoint that a command takes by default.

    Args:
        text: whether to prefer the one that draws text.
    """
    # Needs safetensors, without which `starflow --help` works.
    from ..models.checkpoint import bundled_names

    return TEXT_CHECKPOINT if text and TEXT_CHECKPOINT in bundled_names() else CHECKPOINT


def checkpoint_arguments(
    parser: Parser, batch_size: str = "256", auto: bool = False, default: str | None = CHECKPOINT
) -> None:
    """Add the arguments of a command that runs a checkpoint.

    Args:
        parser: the command's parser.
        batch_size: default number of images per batch, or a text that describes the default. With a text, the parsed
            default is None.
        auto: whether the batch size may be "auto".
        default: default checkpoint; None if it is `default_checkpoint` of the prompt.
    """
    described = default or f"{default_checkpoint(text=True)} for a prompt, {CHECKPOINT} otherwise"
    parser.add_argument(
        "--checkpoint",
        type=non_empty,
        default=default,
        metavar="FOLDER",
        help=f"Folder of the checkpoint, or the name of a bundled one. Default: {described}.",
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
        type=seed,
        default=default,
        metavar="N",
        help=f"Seed of all random numbers. Default: {described}.",
    )


def refuse(given: dict[str, Any], reason: str) -> None:
    """Raise ConfigError for the first flag that was given: it would have no effect.

    Args:
        given: value of each flag; None and False stand for one that was not given.
        reason: why the flags would have no effect.
    """
    for flag, value in given.items():
        if value is not None and value is not False:
            raise ConfigError(f"{flag}: {reason}")


def non_empty(text: str) -> str:
    """Parse the name of a file, a folder or a host."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a name")
    return text


def prompt_text(text: str) -> str:
    """Parse a prompt, without the spaces around it."""
    if not (found := text.strip()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a prompt")
    return unicode_text(found)


def unicode_text(text: str) -> str:
    """Parse text, without the spaces around it; bytes of another encoding than UTF-8 are refused."""
    if not text.isprintable() and any("\ud800" <= c <= "\udfff" for c in text):
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8 text")
    return text.strip()


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    return _integer(text, 1)


def positive_or_auto(text: str) -> int | str:
    """Parse an integer of at least 1, or "auto"."""
    return text if text == "auto" else positive(text)


def non_negative(text: str) -> int:
    """Parse an integer of at least 0."""
    return _integer(text, 0)


def seed(text: str) -> int:
    """Parse a seed."""
    return _integer(text, 0, MAX_SEED)


def thread_count(text: str) -> int:
    """Parse a number of threads."""
    return _integer(text, 1, MAX_THREADS)


def byte_count(text: str) -> int:
    """Parse a number of bytes: 8GB (units of 1000), 512MiB (units of 1024) or a plain number."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]i?)?B?", text.strip(), re.IGNORECASE)
    unit = ((found and found[2]) or "").upper()
    scale = (1024 if unit.endswith("I") else 1000) ** " KMGT".index(unit[:1] or " ")
    if not found or not 1 <= (size := Decimal(found[1]) * scale) <= MAX_INTEGER:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 8GB or 512MiB")
    return int(size)


def _integer(text: str, low: int, high: int = MAX_INTEGER) -> int:
    """Parse an integer from `low` to `high`."""
    if not re.fullmatch(r"[+-]?\d{1,100}", text) or (number := int(text)) < low:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {low}")
    if number > high:
        raise argparse.ArgumentTypeError(f"{text!r} is larger than {high}")
    return number


def device(name: str) -> str:
    """Return the name of a device that torch can use; "auto" is CUDA if there is a GPU, else the CPU.

    Raises:
        ConfigError: torch cannot use the device.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:[0-9]+)?", name):
        raise ConfigError(f"--device {name}: expected cpu, cuda, cuda:1, mps or auto")
    try:
        check_device(name)
    except ConfigError as error:
        raise ConfigError(f"--{error}") from None
    return name


@contextlib.contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt in the block. Handlers can be set in the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        # The handler of another library than Python's is None.
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
