"""Command `starflow eval`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch

from ..data import datasets
from ..errors import DataError
from ..evaluation.metrics import bayes_accuracy, likelihood, logdet_error, round_trips
from ..models.checkpoint import resolve
from ..models.flow import Flow
from ..seeds import generator
from ..settings import read_settings
from ..training.flow import FlowRunConfig
from ..training.loop import SETTINGS
from .common import DTYPES, Parser, checkpoint_arguments, device, non_empty, positive, refuse

# Largest image whose Jacobian is checked: it takes one backward pass per value.
JACOBIAN_DIMS = 768
DRAWS = 8

EXAMPLE = "starflow eval --checkpoint runs/digits --json report.json"


def add_arguments(parser: Parser) -> None:
    """Add the arguments of this command."""
    checkpoint_arguments(parser)
    parser.add_argument(
        "--data",
        type=non_empty,
        metavar="FOLDER",
        help="Folder of images, one folder per class: CLASS/*.png. Default: the data that the flow was trained on.",
    )
    parser.add_argument(
        "--split",
        choices=("held-out", "train"),
        help="Part of the flow's own data to use. Default: held-out.",
    )
    parser.add_argument(
        "--draws",
        type=positive,
        metavar="N",
        help=f"Draws of the dequantization noise per image. Default: {DRAWS}.",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure likelihood, accuracy and exactness on images; print and return the results."""
    folder = resolve(args.checkpoint)
    flow = Flow.from_pretrained(folder, device(args.device), DTYPES[args.dtype])
    train, images = _evaluation_data(args, folder, flow)
    options = {"draws": args.draws or DRAWS, "batch_size": args.batch_size, "seed": args.seed}
    results: dict[str, Any] = {"images": len(images)}
    if flow.config.noise_std == 0:
        results["likelihood"] = dataclasses.asdict(likelihood(flow, images, **options))
        print("bits/dim {bits_per_dim:.4f} +- {standard_error:.4f} ({images} images)".format(**results["likelihood"]))
        if flow.config.num_classes:
            prior = torch.bincount(train.labels, minlength=flow.config.num_classes).double() / len(train)
            results["bayes_accuracy"] = bayes_accuracy(flow, images, prior, **options)
            print(f"accuracy as a classifier {100 * results['bayes_accuracy']:.2f} %")
    else:
        refuse({"--draws": args.draws}, "the model was trained with Gaussian noise, not with dequantization")
        print("bits/dim not measured: the model was trained with Gaussian noise, not with dequantization")
    for name, trip in round_trips(flow, images, seed=args.seed).items():
        results[name] = dataclasses.asdict(trip)
        print(
            "{}: max {max:.1e}, mean {mean:.1e}; of {values} values, {above_1e3} above 1e-3 and {above_1e2} above "
            "1e-2".format(name.replace("_", " "), **results[name])
        )
    pixels, label = images[0]
    if pixels.numel() <= JACOBIAN_DIMS:
        x = datasets.dequantize(pixels, flow.config.levels, flow.config.noise_std, generator(args.seed))
        exact = Flow.from_pretrained(folder, flow.device, torch.float64)
        label = label.item() if flow.config.num_classes else None
        results["logdet_error"] = logdet_error(exact, x.double().to(flow.device), label)
        print(f"log-determinant against the Jacobian, float64: {results['logdet_error']:.1e}")
    else:
        print(f"log-determinant not checked: a Jacobian of {pixels.numel()} dimensions is too large")
    return results


def _evaluation_data(args: argparse.Namespace, folder: Path, flow: Flow) -> tuple[datasets.ImageSet, datasets.ImageSet]:
    """Return the training images and the images to evaluate on."""
    if args.data:
        refuse({"--split": args.split}, "all images of --data are used")
        config = datasets.DataConfig(source="folder", path=args.data, size=flow.config.image_size, held_out=0.0)
    elif (folder / SETTINGS).exists():
        config = FlowRunConfig.from_dict(read_settings(folder / SETTINGS)).data
    else:
        raise DataError(f"{folder} has no {SETTINGS} that names its training data: give --data FOLDER")
    if config.source == "latents":
        raise DataError(f"{folder} is a flow on latents: there are no images to evaluate it on")
    train, held_out = datasets.load(config)
    images = train if args.data or args.split == "train" else held_out
    if not len(images):
        where = "" if args.data else f"the {args.split or 'held-out'} part of "
        raise DataError(f"no images to evaluate on in {where}{config.path or config.source}")
    if flow.config.num_classes and len(images.classes) > flow.config.num_classes:
        raise DataError(f"{len(images.classes)} classes of images, but the model has {flow.config.num_classes}")
    if images.levels != flow.config.levels:
        raise DataError(f"images of {images.levels} grey levels, but the model has {flow.config.levels}")
    return train, images
