"""Command `starflow eval`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

import torch

from ..data import datasets
from ..errors import ConfigError, DataError
from ..evaluation.metrics import logdet_error, round_trips, score
from ..models.checkpoint import resolve
from ..models.flow import Flow
from ..sampling.processes import Processes
from ..seeds import generator
from ..settings import read_settings
from ..training.config import SETTINGS
from ..training.flow import FlowRunConfig
from .common import DTYPES, Parser, checkpoint_arguments, non_empty, positive, refuse
from .image_scores import drawing_arguments, given, measure, score_arguments
from .options import process_device

# Largest image whose Jacobian is checked: it takes one backward pass per value.
JACOBIAN_DIMS = 768
DRAWS = 8
BATCH = 256

EXAMPLE = "starflow eval --checkpoint runs/digits --json report.json"


def add_arguments(parser: Parser) -> None:
    """Add the arguments of this command."""
    checkpoint_arguments(parser, batch_size=f"{BATCH}, or 8 to draw from a pipeline")
    parser.add_argument(
        "--bits-per-dim",
        action="store_true",
        help="Measure likelihood and round trips alone. Default: also the accuracy as a classifier and the "
        "log-determinant.",
    )
    parser.add_argument(
        "--fid",
        action="store_true",
        help="Measure FID, KID, inception score, precision and recall, of a folder of images or of images drawn with "
        "the model. Default: measure densities, which --bits-per-dim adds.",
    )
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
    parser.add_argument(
        "--importance",
        type=positive,
        metavar="K",
        help="Also give the importance-weighted bound of K draws, -log mean p(x + u), in place of --draws. Default: "
        "the mean of -log p(x + u) alone.",
    )
    score_arguments(parser)
    drawing_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what the arguments ask for; print and return the results."""
    if not args.fid:
        refuse(given(args, score_arguments) | given(args, drawing_arguments), "it goes with --fid")
    processes = Processes()
    # Joined before a model is loaded, which may take a different time in each process.
    processes.join()
    results: dict[str, Any] = {}
    if args.bits_per_dim or not args.fid:
        # Rank 0 alone prints.
        with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.ExitStack() as stack:
            if processes.rank:
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            results |= _densities(args, processes)
    else:
        names = ("data", "split", "draws", "importance")
        refuse({f"--{name}": getattr(args, name) for name in names}, "--fid measures no densities, see --bits-per-dim")
    if args.fid:
        results["image_scores"] = measure(args)
    if processes.rank:
        args.json = None
        return {}
    return {**results, "processes": processes.count}


def _densities(args: argparse.Namespace, processes: Processes) -> dict[str, Any]:
    """Measure likelihood and round trips; without --bits-per-dim also the accuracy and the log-determinant."""
    folder = resolve(args.checkpoint)
    flow = Flow.from_pretrained(folder, process_device(args.device), DTYPES[args.dtype])
    train, images = _evaluation_data(args, folder, flow)
    results: dict[str, Any] = {"images": len(images)}
    gaussian = "the model was trained with Gaussian noise, not with dequantization"
    if flow.config.noise_std == 0:
        results |= _likelihood(args, flow, images, train)
    elif args.bits_per_dim:
        raise ConfigError(f"--bits-per-dim: {gaussian}")
    else:
        refuse({"--draws": args.draws, "--importance": args.importance}, gaussian)
        print(f"bits/dim not measured: {gaussian}")
    # A single batch.
    for name, trip in processes.first(lambda: round_trips(flow, images, seed=args.seed)).items():
        results[name] = dataclasses.asdict(trip)
        print(
            "{}: max {max:.1e}, mean {mean:.1e}; of {values} values, {above_1e3} above 1e-3 and {above_1e2} above "
            "1e-2".format(name.replace("_", " "), **results[name])
        )
    pixels, label = images[0]
    if args.bits_per_dim or processes.rank:
        return results
    if pixels.numel() <= JACOBIAN_DIMS:
        x = datasets.dequantize(pixels, flow.config.levels, flow.config.noise_std, generator(args.seed))
        exact = Flow.from_pretrained(folder, flow.device, torch.float64)
        label = label.item() if flow.config.num_classes else None
        results["logdet_error"] = logdet_error(exact, x.double().to(flow.device), label)
        print(f"log-determinant against the Jacobian, float64: {results['logdet_error']:.1e}")
    else:
        print(f"log-determinant not checked: a Jacobian of {pixels.numel()} dimensions is too large")
    return results


def _likelihood(
    args: argparse.Namespace, flow: Flow, images: datasets.ImageSet, train: datasets.ImageSet
) -> dict[str, Any]:
    """Measure bits per dimension, and without --bits-per-dim the accuracy of a class-conditional flow."""
    refuse({"--draws": args.importance and args.draws}, "the draws of --importance serve both bounds")
    prior = None
    if flow.config.num_classes and not args.bits_per_dim:
        prior = torch.bincount(train.labels, minlength=flow.config.num_classes).double() / len(train)
    draws = args.importance or args.draws or DRAWS
    scores = score(flow, images, draws, args.batch_size or BATCH, args.seed, prior)
    bounds = {"likelihood": ("bits/dim", scores.uniform())}
    if args.importance:
        name = f"bits/dim, importance-weighted over {draws} draws"
        bounds["importance_weighted"] = name, scores.importance_weighted()
    for name, bound in bounds.values():
        error = "" if bound.standard_error is None else f" +- {bound.standard_error:.4f}"
        print(f"{name} {bound.bits_per_dim:.4f}{error} ({bound.images} image{'s' * (bound.images > 1)})")
    results: dict[str, Any] = {name: dataclasses.asdict(bound) for name, (_, bound) in bounds.items()}
    if prior is None:
        return results
    print(f"accuracy as a classifier {100 * scores.accuracy():.2f} %")
    return {**results, "bayes_accuracy": scores.accuracy()}


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
