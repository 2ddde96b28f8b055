"""Command `starflow convert`."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from ..convert import convert, export_upstream
from ..io.weights import MAX_BYTES
from .common import DTYPES, Parser, byte_count, non_empty, refuse

EXAMPLE = "starflow convert afhq_model_8_768_8_8_0.07.pth --out afhq"


def add_arguments(parser: Parser) -> None:
    """Add the arguments of this command."""
    parser.add_argument(
        "source",
        type=non_empty,
        help="The .pth file to convert; with --to upstream, a folder of this package or of diffusers. Required.",
    )
    parser.add_argument(
        "--out",
        type=non_empty,
        required=True,
        metavar="FOLDER",
        help="Folder to write; it appears only once it is complete. Required.",
    )
    parser.add_argument(
        "--config",
        type=non_empty,
        metavar="FILE",
        help="YAML configuration of the original code. Default: read from the file's name (TarFlow).",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="Data type of the written weights. Default: that of the file."
    )
    parser.add_argument(
        "--to",
        choices=("ours", "upstream"),
        default="ours",
        help="Format to write: this package's (ours) or the original code's (upstream). Default: ours.",
    )
    parser.add_argument(
        "--drop",
        action="append",
        metavar="PATTERN",
        help="Leave out unknown weights whose names match PATTERN; may be repeated. Default: refuse them.",
    )
    parser.add_argument(
        "--max-file-size",
        type=byte_count,
        metavar="SIZE",
        help="Largest size of a weight file, such as 500MB or 2GiB. Default: 5GB.",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="Replace a folder that an earlier conversion wrote. Default: refuse an existing folder.",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Convert a checkpoint; print and return what was kept, dropped and checked."""
    refuse({"--device": None if args.device in ("auto", "cpu") else args.device}, "a conversion runs on the CPU")
    if args.to == "upstream":
        given = {
            "--config": args.config,
            "--dtype": args.dtype,
            "--drop": args.drop,
            "--max-file-size": args.max_file_size,
        }
        refuse(given, "--to upstream keeps weights and settings, in one file")
        report = export_upstream(args.source, args.out, args.overwrite)
    else:
        dtype = DTYPES[args.dtype] if args.dtype else None
        size = args.max_file_size or MAX_BYTES
        report = convert(args.source, args.out, args.config, dtype, args.drop or (), size, args.overwrite)
    print(f"{args.out}: {', '.join(report.files)}")
    print("\n".join(report.lines()))
    return dataclasses.asdict(report)
