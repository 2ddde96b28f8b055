"""Command `starflow encode`."""

from __future__ import annotations

import argparse
import typing
from pathlib import Path
from typing import Any

from ..data.datasets import DataConfig
from ..data.encode import EncodeConfig, TextDtype, encode
from ..errors import ConfigError
from ..settings import override, read_section, read_settings, section
from ..training.config import SETTINGS
from .common import Parser, device, non_empty, positive, refuse

EXAMPLE = "starflow encode --vae runs/autoencoder --text runs/text --length 8 --out runs/latents"


def add_arguments(parser: Parser) -> None:
    """Add the arguments of this command."""
    parser.add_argument(
        "--vae",
        type=non_empty,
        metavar="FOLDER",
        required=True,
        help="Folder of an AutoencoderKL in the layout of diffusers. Required.",
    )
    parser.add_argument(
        "--text",
        type=non_empty,
        metavar="FOLDER",
        help="Folder with text_encoder/ and tokenizer/, to encode captions too. Default: no captions.",
    )
    parser.add_argument(
        "--length",
        type=positive,
        metavar="N",
        help=f"Tokens per caption's text states. Default: {EncodeConfig.length}.",
    )
    parser.add_argument(
        "--text-dtype",
        choices=typing.get_args(TextDtype),
        help="Data type of the stored text states; none stores tokens alone, for a text encoder that is trained along. "
        f"Default: {EncodeConfig.text_dtype}.",
    )
    parser.add_argument(
        "--config",
        type=non_empty,
        metavar="FILE",
        help="YAML file with a section data that names the images. Default: the settings in the autoencoder's folder.",
    )
    parser.add_argument(
        "--set",
        metavar="data.NAME=VALUE",
        action="append",
        default=[],
        help="Change one setting, such as data.size=64; may be repeated. Default: no change.",
    )
    parser.add_argument(
        "--out",
        type=non_empty,
        metavar="CACHE",
        required=True,
        help="Folder for the cache files and their index. Required.",
    )
    parser.add_argument(
        "--rows-per-file", type=positive, default=4096, metavar="N", help="Rows per cache file. Default: 4096."
    )
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N", help="Images per batch. Default: 32.")
    parser.add_argument(
        "--quiet", action="store_true", help="Show no progress bar. Default: show one if standard error is a terminal."
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Fill a cache of latents, or complete an interrupted one."""
    if not args.text:
        refuse({"--length": args.length, "--text-dtype": args.text_dtype}, "captions are encoded with --text alone")
    path = Path(args.config) if args.config else Path(args.vae) / SETTINGS
    settings = read_settings(path) if args.config or path.exists() else {"data": {}}
    if not isinstance(settings.get("data"), dict):
        raise ConfigError(f"{path}: no section data")
    override(settings, args.set)
    images = read_section("data", section(DataConfig), settings["data"])
    config = EncodeConfig(
        images,
        args.vae,
        args.text or "",
        args.length or EncodeConfig.length,
        args.text_dtype or EncodeConfig.text_dtype,
        args.rows_per_file,
    )
    report = encode(config, Path(args.out), device(args.device), args.batch_size, args.quiet)
    counts = ", ".join(f"{count} {kind.replace('_', '-')}" for kind, count in report.index.counts.items())
    done = "already complete"
    if report.written:
        done = f"{report.written} cache files written, {report.found} were already there"
    print(f"{args.out}: {counts}; {done}")
    return {"written": report.written, "found": report.found, "counts": report.index.counts}
