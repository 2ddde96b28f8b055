"""starflow encode"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..data.datasets import DataConfig
from ..data.encode import EncodeConfig, encode
from ..errors import ConfigError
from ..settings import override, read_settings, section
from ..training.loop import SETTINGS
from .common import Parser, device, positive

HELP = "encode images to latents once, with the text states of their captions"
EXAMPLE = "starflow encode --vae runs/autoencoder --text runs/text --length 8 --out runs/latents"


def add_arguments(parser: Parser) -> None:
    """The arguments of this command."""
    parser.add_argument("--vae", metavar="FOLDER", required=True, help="AutoencoderKL in the diffusers layout")
    parser.add_argument("--text", metavar="FOLDER", default="", help="text_encoder/ and tokenizer/ (default: no text)")
    parser.add_argument("--length", type=positive, default=128, help="tokens of the text states (default 128)")
    parser.add_argument("--text-dtype", choices=("float32", "bfloat16"), default="float32", help="of the stored states")
    parser.add_argument("--config", metavar="FILE", help="YAML with a section data (default: the autoencoder's own)")
    parser.add_argument("--set", metavar="data.NAME=VALUE", action="append", default=[], help="change a setting")
    parser.add_argument("--out", metavar="CACHE", required=True, help="folder for the shards and their manifest")
    parser.add_argument("--shard-size", type=positive, default=4096, help="rows of a shard (default 4096)")
    parser.add_argument("--batch-size", type=positive, default=32, help="images at a time (default 32)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Fill a cache of latents, or what is missing of one."""
    path = Path(args.config) if args.config else Path(args.vae) / SETTINGS
    settings = read_settings(path) if args.config or path.exists() else {"data": {}}
    if not isinstance(settings.get("data"), dict):
        raise ConfigError(f"{path}: no section data")
    override(settings, args.set)
    images = section(DataConfig)(settings["data"])
    config = EncodeConfig(images, args.vae, args.text, args.length, args.text_dtype, args.shard_size)
    report = encode(config, Path(args.out), device(args.device), args.batch_size, args.quiet)
    counts = ", ".join(f"{count} {kind.replace('_', '-')}" for kind, count in report.manifest.counts.items())
    done = "complete already" if not report.written else f"{report.written} shards written, {report.found} were there"
    print(f"{args.out}: {counts}; {done}")
    return {"written": report.written, "found": report.found, "counts": report.manifest.counts}
