"""Command line: `starflow COMMAND`, or `python -m starflow COMMAND`."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import gc
import importlib
import io
import json
import os
import platform
import re
import sys
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, TextIO

from ..errors import ConfigError, StarflowError
from .packages import install_line

# A process that ends needs no collection of garbage, which takes a second once diffusers and transformers are imported.
atexit.register(gc.freeze)

# Messages of torch, which reports some failed allocations as a RuntimeError.
OUT_OF_MEMORY = re.compile("out of memory|allocate memory|size calculation overflowed", re.IGNORECASE)
# Name of each command -> its module, and its description.
COMMANDS = {
    "train": ("train", "Train a flow on images or on cached latents."),
    "train-autoencoder": ("train_autoencoder", "Train a small autoencoder, on whose latents a flow can be trained."),
    "train-pipeline": ("train_pipeline", "Train a whole text-to-image pipeline, stage by stage."),
    "train-decoder": ("train_decoder", "Fine-tune the decoder of an autoencoder on noisy latents."),
    "export": ("export", "Write the weights of a run's last checkpoint as a checkpoint folder of a flow."),
    "encode": ("encode", "Encode images to latents once, together with the text states of their captions."),
    "sample": ("sample", "Draw images with a flow or a pipeline."),
    "eval": ("evaluate", "Measure likelihood, accuracy and exactness of a flow on images."),
    "plot": ("plot", "Draw the metrics and the samples of a training run."),
    "calibrate": (
        "calibrate",
        "Measure the fastest exact solver of each block, for starflow sample --method auto.",
    ),
    "info": ("info", "Describe this installation, this machine and, if asked, a checkpoint."),
    "convert": (
        "convert",
        "Convert a checkpoint of the original TarFlow or STARFlow code, or convert one back.",
    ),
    "demo": ("demo", "Draw images from a local web page."),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after `starflow`, by default those of the process.

    Returns:
        The exit status: 0, 2 after an error that the user can correct, 130 when interrupted, or 141 when the reader of
        a pipe has closed it.
    """
    status = 0
    with _escaped(sys.stdout), _escaped(sys.stderr), warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            try:
                status = _main(arguments)
            finally:
                print(end="", flush=True)
        except OSError as error:
            # Python flushes standard output once more when it exits.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(error, BrokenPipeError):
                return 141
            return status or _report("starflow", f"standard output: {error.strerror}")
    return status


def _main(arguments: list[str] | None) -> int:
    """Run the command line and return its exit status."""
    name = "starflow"
    try:
        # The commands are imported here, so that a missing package is reported in one line.
        words = sys.argv[1:] if arguments is None else arguments
        args = parser(words[:1]).parse_args(words or ["--help"])
        name = f"starflow {args.command}"
        _run(args)
    except StarflowError as error:
        return _report(name, str(error))
    except ModuleNotFoundError as error:
        if (message := install_line(error.name)) is None:
            raise
        return _report(name, message)
    except BrokenPipeError:
        raise
    except OSError as error:
        return _report(name, str(error))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        return _report(name, f"not enough memory: {error}")
    except KeyboardInterrupt:
        return 130
    return 0


def _report(name: str, message: str) -> int:
    """Print an error in one line and return its exit status."""
    with contextlib.suppress(OSError):
        print(f"{name}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _show_warning(message: Warning | str, *_: Any) -> None:
    """Print a warning in one line, above a progress bar if there is one."""
    from tqdm import tqdm

    with contextlib.suppress(OSError):
        tqdm.write(f"starflow: warning: {' '.join(str(message).split())}", file=sys.stderr)


@contextlib.contextmanager
def _escaped(stream: TextIO) -> Iterator[None]:
    """Let a stream write what its encoding lacks, such as some file names, as backslash escapes."""
    if not isinstance(stream, io.TextIOWrapper):
        yield
        return
    errors = stream.errors
    stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            stream.reconfigure(errors=errors)


def parser(wanted: Collection[str] = tuple(COMMANDS)) -> argparse.ArgumentParser:
    """Return the parser. Only the commands in `wanted` are imported and get their arguments."""
    from starflow_kernels import __version__

    from .common import MAX_THREADS, Parser, non_empty, thread_count

    root = Parser(
        prog="starflow",
        description="Train, sample and evaluate TarFlow and STARFlow models. A flow turns noise into images and back; "
        "try: starflow sample",
    )
    version = {"action": "version", "version": f"starflow {__version__}", "help": "Print the version and exit."}
    root.add_argument("--version", **version)
    subparsers = root.add_subparsers(
        title="commands", dest="command", metavar="COMMAND", required=True, parser_class=Parser
    )
    for name, (module, summary) in COMMANDS.items():
        sub = subparsers.add_parser(
            name, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name not in wanted:
            continue
        command = importlib.import_module(f".{module}", __name__)
        sub.epilog = f"example:\n  {command.EXAMPLE}"
        sub.set_defaults(run=command.run)
        command.add_arguments(sub)
        common = sub.add_argument_group("options of every command")
        common.add_argument("--version", **version)
        common.add_argument(
            "--device",
            default="auto",
            help="Device to run on: cpu, cuda, cuda:1, mps or auto. Default: auto, which is CUDA or the CPU.",
        )
        common.add_argument(
            "--threads",
            type=thread_count,
            metavar="N",
            help=f"Number of CPU threads, 1 to {MAX_THREADS}; small models run best with 1. Default: torch's choice.",
        )
        common.add_argument(
            "--json",
            nargs="?",
            type=non_empty,
            const="-",
            metavar="FILE",
            help="Write the results as JSON to FILE. Without FILE, or with -, they go to standard output, and the text "
            "for people goes to standard error. Default: no JSON.",
        )
    return root


def _run(args: argparse.Namespace) -> None:
    """Run a parsed command and write its report."""
    import torch

    from ..io.files import check_writable, write_text

    file = Path(args.json) if args.json and args.json != "-" else None
    if file:
        if file.is_dir():
            raise ConfigError(f"--json {file} is a folder")
        check_writable(file.parent)
    with contextlib.ExitStack() as stack:
        if args.threads:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(args.threads)
        # With JSON on standard output, the text for people goes to standard error.
        if args.json == "-":
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        results = args.run(args)
        threads = torch.get_num_threads()
    if not args.json:
        return
    report = {
        "command": args.command,
        "arguments": {k: v for k, v in vars(args).items() if k not in ("run", "command", "json")},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "threads": threads,
        "results": results,
    }
    text = json.dumps(report, indent=2, default=str) + "\n"
    if file:
        write_text(file, text)
    else:
        print(text, end="")
