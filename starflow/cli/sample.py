"""starflow sample"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..flow import Flow, Guidance
from ..sampling import sample, save_grid, save_image
from .common import DTYPES, Parser, checkpoint_arguments, device, positive

HELP = "draw images"
EXAMPLE = "starflow sample --num 100 --label all --out samples"


def add_arguments(parser: Parser) -> None:
    """The arguments of this command."""
    checkpoint_arguments(parser)
    parser.add_argument("--num", type=positive, default=100, help="number of images (default 100)")
    parser.add_argument("--label", default="all", help="class number, 'all' for each in turn (default), or 'none'")
    parser.add_argument("--guidance", type=float, default=0.0, help="guidance weight (default 0)")
    parser.add_argument("--guidance-rule", choices=("tarflow", "starflow"), default="tarflow")
    parser.add_argument("--annealed", action="store_true", help="let guidance grow over the tokens of a block")
    parser.add_argument("--attention-temperature", type=float, default=1.0, help="of the branch without a condition")
    parser.add_argument("--denoise", type=float, default=0.0, help="factor of the score step, about 1 (default: none)")
    parser.add_argument("--certify", action="store_true", help="report max |flow(x) - z| over the samples")
    parser.add_argument("--out", default="samples", help="folder for grid.png (default samples)")
    parser.add_argument("--images", action="store_true", help="write each image as a PNG too")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Draw a grid of images."""
    flow = Flow.from_pretrained(args.checkpoint, device(args.device), DTYPES[args.dtype])
    classes = flow.config.num_classes
    labels = _labels(args.label, args.num, classes)
    guidance = Guidance(args.guidance, args.guidance_rule, args.annealed, args.attention_temperature)
    images, report = sample(
        flow, args.num, labels, guidance, args.seed, args.batch_size, args.denoise, certify=args.certify
    )
    out = Path(args.out)
    columns = classes if labels is not None and args.label == "all" and classes <= 20 else min(args.num, 10)
    save_grid(images, out / "grid.png", columns)
    if args.images:
        for i, image in enumerate(images):
            save_image(image, out / f"{i:06d}.png")
    print(f"{out / 'grid.png'}: {report.count} images in {report.seconds:.2f} s", end="")
    print("" if report.certificate is None else f", max |flow(x) - z| = {report.certificate:.1e}")
    return {"grid": str(out / "grid.png"), "guidance": dataclasses.asdict(guidance), **dataclasses.asdict(report)}


def _labels(label: str, count: int, classes: int) -> torch.Tensor | None:
    if label == "none" or (label == "all" and not classes):
        return None
    if label == "all":
        return torch.arange(count) % classes
    if not label.isdecimal() or int(label) >= classes:
        allowed = f"0 .. {classes - 1}, 'all' or 'none'" if classes else "'none': the model has no classes"
        raise ConfigError(f"--label {label}: expected {allowed}")
    return torch.full((count,), int(label))
