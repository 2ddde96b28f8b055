"""FID and other scores of images for the command `starflow eval`."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..evaluation.fid import Features, extract, image_scores, image_size, images_below
from ..evaluation.inception import LAYERS, POOL, WEIGHTS, Inception
from ..evaluation.statistics import Statistics, read_statistics
from ..io.digests import digest
from ..io.files import check_writable
from ..sampling.processes import Processes
from . import sample
from .common import Parser, byte_count, non_empty, positive, refuse
from .options import (
    denoise_argument,
    guidance_arguments,
    label_argument,
    process_device,
    prompt_file_argument,
    solver_arguments,
    temperature_argument,
)

COUNT = 50_000


def score_arguments(parser: Parser) -> None:
    """Add the arguments of --fid, except --fid itself and those that draw images."""
    group = parser.add_argument_group("FID")
    group.add_argument(
        "--reference",
        type=non_empty,
        metavar="PATH",
        help="Folder of reference images, or a file of their statistics: .npz of ADM or of --save-statistics, or "
        "*_fid_stats.pth of the TarFlow code. Default: none.",
    )
    group.add_argument(
        "--images",
        type=non_empty,
        metavar="FOLDER",
        help="Folder of the images to evaluate. Default: images are drawn with the model.",
    )
    group.add_argument(
        "--inception",
        type=non_empty,
        metavar="FILE",
        help=f"Weights of torch-fidelity's Inception network. Default: {WEIGHTS} in torch's cache of downloads.",
    )
    group.add_argument(
        "--layer",
        type=int,
        choices=LAYERS,
        help=f"Layer of the Inception network, by its number of features. Default: {POOL}, as in published scores.",
    )
    group.add_argument(
        "--crop",
        action="store_true",
        help="Scale the reference images to the size of the evaluated ones, and crop their center. Default: refuse "
        "images of another size.",
    )
    group.add_argument(
        "--save-statistics",
        type=non_empty,
        metavar="FILE",
        help="Write the statistics of the evaluated images to an .npz file, for a later --reference. Default: none.",
    )


def drawing_arguments(parser: Parser) -> None:
    """Add the arguments that draw the images to evaluate."""
    group = parser.add_argument_group("images that are drawn for FID")
    group.add_argument(
        "--count",
        type=positive,
        metavar="N",
        help=f"Number of images, or of images per prompt. Default: {COUNT}, or 1 per prompt.",
    )
    group.add_argument(
        "--out",
        type=non_empty,
        metavar="FOLDER",
        help="Folder for the images, which an interrupted command continues. Default: samples.",
    )
    group.add_argument(
        "--memory",
        type=byte_count,
        metavar="SIZE",
        help="Memory for the weights and one batch, such as 8GB, in place of --batch-size. Default: that of "
        "--batch-size.",
    )
    group.add_argument(
        "--variant",
        type=non_empty,
        metavar="NAME",
        help="Variant of a pipeline's weight files, such as fp16. Default: none.",
    )
    condition = group.add_mutually_exclusive_group()
    label_argument(condition)
    prompt_file_argument(condition)
    denoise_argument(group)
    guidance_arguments(group, "0, or the pipeline's own")
    temperature_argument(group)
    solver_arguments(parser)


def given(args: argparse.Namespace, add_arguments: Callable[[Parser], None]) -> dict[str, bool]:
    """Return, by flag, whether an argument that a function adds has another value than its default."""
    parser = Parser()
    add_arguments(parser)
    return {_flag(name): getattr(args, name) != default for name, default in vars(parser.parse_args([])).items()}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Draw images if needed, and return their scores; rank 0 prints them."""
    if not (args.reference or args.save_statistics):
        raise ConfigError("--fid: give --reference, or --save-statistics to prepare one")
    if args.images:
        refuse(given(args, drawing_arguments), "the images of --images are evaluated, none are drawn")
    if args.save_statistics:
        check_writable(Path(args.save_statistics).absolute().parent)
    # All input is read before any image is drawn.
    path = None if args.inception is None else Path(args.inception)
    network = Inception(path, args.layer or POOL, process_device(args.device))
    reference, reference_files = _reference(args, network)
    files, drawn = (images_below(Path(args.images)), None) if args.images else _draw(args)
    evaluated = extract(files, network, network.layer, args.images or args.out)
    found: Features | Statistics | None = reference
    if reference_files:
        size = _common_size(args, files[0], reference_files[0])
        found = extract(reference_files, network, network.layer, args.reference, size)

    def finish() -> dict[str, Any]:
        assert evaluated is not None
        scores = image_scores(evaluated, found)
        if args.save_statistics:
            evaluated.statistics.save(Path(args.save_statistics))
        return {
            **scores,
            "images": evaluated.statistics.images,
            "images_sha256": evaluated.digest,
            "processes": len(evaluated.shares),
            "images_per_process": evaluated.shares,
            "seed": args.seed if drawn is not None else None,
            "layer": network.layer,
            "inception": {"path": str(network.path), "sha256": network.digest, "is_published": network.is_published},
            "reference": _reference_report(args, found),
            "drawn": drawn,
        }

    processes = Processes()
    results = processes.first(finish)
    if processes.rank == 0:
        _print(results, network)
    return results


def _reference(args: argparse.Namespace, network: Inception) -> tuple[Statistics | None, list[Path]]:
    """Return the statistics of the reference, or its image files."""
    if args.reference is None:
        refuse({"--crop": args.crop}, "there is no --reference")
        return None, []
    if Path(args.reference).is_dir():
        return None, images_below(Path(args.reference))
    refuse({"--crop": args.crop}, f"{args.reference} is no folder of images")
    return read_statistics(Path(args.reference), network.layer), []


def _draw(args: argparse.Namespace) -> tuple[list[Path], dict[str, Any]]:
    """Draw images as `starflow sample` does; return their files and the report."""
    parser = Parser()
    sample.add_arguments(parser)
    chosen = {**vars(parser.parse_args([])), **vars(args)}
    args.out = chosen["out"] = args.out or sample.DEFAULT_FOLDER
    count = args.count or (None if args.prompt_file else COUNT)
    # A file per image suits any number of processes.
    chosen |= {"num": count, "format": "png", "checkpoint": args.checkpoint, "latents": False}
    report, files = sample.draw(argparse.Namespace(**chosen))
    return files, report


def _common_size(args: argparse.Namespace, evaluated: Path, reference: Path) -> int | None:
    """Return the side that reference images are scaled and cropped to, None if they are taken as they are."""
    height, width = image_size(evaluated)
    if args.crop:
        if height != width:
            raise ConfigError(f"--crop: the images to evaluate have {width}x{height} pixels, they are not square")
        return height
    if (other := image_size(reference)) != (height, width):
        raise ConfigError(
            f"--reference: {reference} has {other[1]}x{other[0]} pixels, {evaluated} has {width}x{height}; --crop "
            "scales and crops the reference"
        )
    return None


def _reference_report(args: argparse.Namespace, found: Features | Statistics | None) -> dict[str, Any] | None:
    if found is None:
        return None
    if isinstance(found, Statistics):
        return {"path": args.reference, "images": found.images, "sha256": digest(Path(args.reference))}
    return {"path": args.reference, "images": found.statistics.images, "sha256": found.digest}


def _print(results: dict[str, Any], network: Inception) -> None:
    """Print the scores, one per line."""
    if network.is_published is False:
        print(f"{network.path}: not the Inception weights of published scores")
    if results["images"] <= network.layer:
        warnings.warn(
            f"{results['images']} images for {network.layer} features: a FID of few images is too high, published ones "
            f"take {COUNT}",
            stacklevel=2,
        )
    if "fid" in results:
        reference = results["reference"]["images"] or "an unknown number"
        print(f"FID {results['fid']:.4f} ({results['images']} images, {reference} in the reference)")
    if "kid" in results:
        print(
            "KID {mean:.6f} +- {standard_deviation:.6f} ({subsets} subsets of {subset_size})".format(**results["kid"])
        )
    if "inception_score" in results:
        print("inception score {mean:.4f} +- {standard_deviation:.4f}".format(**results["inception_score"]))
    if "precision" in results:
        print("precision {precision:.4f}, recall {recall:.4f}".format(**results))
    for name, reason in results["not_measured"].items():
        print(f"{name.replace('_', ' ')} not measured: {reason}")


def _flag(name: str) -> str:
    """Return the flag of a parsed name; those of the upstream code have underscores."""
    return "--" + (name if name.startswith("jacobi") else name.replace("_", "-"))
