"""starflow convert"""

from __future__ import annotations

import argparse
import dataclasses
import re
from typing import Any

from ..convert import convert, release
from ..errors import ConfigError
from ..io.weights import MAX_SHARD
from .common import DTYPES, Parser

HELP = "convert a checkpoint of the released TarFlow or STARFlow code, or ours back to it"
EXAMPLE = "starflow convert afhq_model_8_768_8_8_0.07.pth --out afhq"
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_arguments(parser: Parser) -> None:
    """The arguments of this command."""
    parser.add_argument("source", help="released .pth; with --to released a folder of ours, or of diffusers")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write, whole or not at all")
    parser.add_argument("--config", metavar="YAML", help="released configuration; a TarFlow file's name says enough")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="dtype of the weights (default: the file's)")
    parser.add_argument("--to", choices=("ours", "released"), default="ours", help="direction (default ours)")
    parser.add_argument(
        "--drop", action="append", default=[], metavar="PATTERN", help="leave out weights of other names, repeatable"
    )
    parser.add_argument("--max-shard", type=size, default=MAX_SHARD, metavar="SIZE", help="of a file (default 5GB)")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that a conversion wrote")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Convert and say what was kept, dropped and checked."""
    if args.to == "released":
        if args.config or args.dtype or args.drop:
            raise ConfigError("--config, --dtype and --drop are for the other direction: weights and settings stay")
        report = release(args.source, args.out, args.overwrite)
    else:
        dtype = DTYPES[args.dtype] if args.dtype else None
        report = convert(args.source, args.out, args.config, dtype, args.drop, args.max_shard, args.overwrite)
    print(f"{args.out}: {', '.join(report.files)}")
    print("\n".join(report.lines()))
    return dataclasses.asdict(report)


def size(text: str) -> int:
    """argparse type: bytes, as in 500MB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]B)", text)
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB or 5GB")
    return int(float(match[1]) * UNITS[match[2]])
