"""Command `starflow calibrate`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..errors import ConfigError
from ..inversion.measure import WINDOWS, WORTH
from ..inversion.request import TOLERANCE, Inversion
from ..io.files import check_writable, write_folder
from ..models.calibration import SOLVERS, Measurement, save_calibration
from ..models.checkpoint import BUNDLED, TRANSFORMER, is_pipeline, locate, resolve
from ..models.flow import Flow
from ..models.guidance import Guidance
from ..opening import open_image_model
from ..training.checkpoints import FOLDER
from ..training.loop import METRICS
from .common import (
    DTYPES,
    Parser,
    device,
    non_empty,
    non_negative,
    positive,
    refuse,
    seed_argument,
)
from .options import guidance_arguments, read_guidance

DEFAULT_PROMPTS = ["a photo"]

EXAMPLE = "starflow calibrate --checkpoint runs/photos --batch-size 1 16"


def add_arguments(parser: Parser) -> None:
    """Add the arguments of this command."""
    parser.add_argument(
        "--checkpoint",
        "--model",
        type=non_empty,
        default="digits",
        metavar="FOLDER",
        help="Folder of a flow or pipeline, or the name of a bundled one. Default: digits, which is bundled and "
        "needs --out.",
    )
    parser.add_argument(
        "--batch-size",
        type=positive,
        nargs="+",
        default=[1, 16],
        metavar="N",
        help="Batch sizes to measure. Default: 1 16.",
    )
    parser.add_argument(
        "--tol",
        type=float,
        default=TOLERANCE,
        metavar="X",
        help=f"Tolerance of the parallel solvers. Default: {TOLERANCE:g}.",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="Data type of the weights in memory. Default: float32."
    )
    guidance_arguments(parser, "0")
    parser.add_argument(
        "--prompt",
        nargs="+",
        metavar="TEXT",
        help="Prompts to draw in turn, with a text-to-image pipeline. Default: 'a photo'.",
    )
    parser.add_argument(
        "--windows",
        type=non_negative,
        nargs="+",
        default=list(WINDOWS),
        metavar="N",
        help=f"Windows to try, in tokens; 0 means all tokens. Default: {' '.join(map(str, WINDOWS))}.",
    )
    seed_argument(parser)
    parser.add_argument(
        "--out",
        type=non_empty,
        metavar="FOLDER",
        help="Copy the checkpoint to this folder and store the result there. Default: store it in the checkpoint.",
    )
    parser.add_argument(
        "--verbose", action="store_true", help="Print the solver of each block. Default: print a line per batch size."
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the solvers, print the results and store them."""
    pipeline = is_pipeline(args.checkpoint)
    folder = locate(args.checkpoint) if pipeline else resolve(args.checkpoint)
    _check_target(args, folder)
    Inversion("jacobi", tol=args.tol)
    flow, text, empty = _open(args, folder)
    guidance = read_guidance(args, Guidance(rule="starflow" if flow.config.text_dim else "tarflow"))
    options = {"tol": args.tol, "windows": args.windows, "text": text, "empty_text": empty, "seed": args.seed}
    results = []
    for batch_size in sorted(set(args.batch_size)):
        with tqdm(total=len(flow.blocks), desc=f"batch {batch_size}", unit="block", leave=False, disable=None) as bar:
            measured = flow.calibrate(batch_size, guidance, on_block=lambda *_, bar=bar: bar.update(), **options)
        print(measured)
        if args.verbose:
            for i, block in reversed(list(enumerate(measured.blocks))):
                print(f"  block {i}: {block}")
        results.append(_to_json(measured))
    if args.verbose:
        print(
            f"A parallel solver is chosen if it is {1 - WORTH:.0%} faster in repeated measurements, with an error of "
            "at most about 10 times the tolerance."
        )
    part = TRANSFORMER if pipeline else ""
    if args.out:
        with write_folder(Path(args.out)) as target:
            shutil.copytree(
                folder, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(FOLDER, METRICS, "samples")
            )
            save_calibration(flow.calibration, target / part)
    else:
        save_calibration(flow.calibration, folder / part)
    written = Path(args.out or folder, part, SOLVERS)
    print(f"written to {written}")
    return {"written": str(written), "measurements": results}


def _check_target(args: argparse.Namespace, folder: Path) -> None:
    """Check that the result can be stored, before anything is measured."""
    if args.out:
        if os.path.lexists(args.out):
            raise ConfigError(f"--out {args.out} exists already")
        check_writable(Path(args.out).parent)
    elif BUNDLED in folder.parents:
        raise ConfigError(
            f"{args.checkpoint} is bundled and cannot be changed: name a folder for a calibrated copy with --out FOLDER"
        )
    elif not os.access(folder, os.W_OK):
        raise ConfigError(f"--out FOLDER: {folder} cannot be written to")


def _open(args: argparse.Namespace, folder: Path) -> tuple[Flow, torch.Tensor | None, torch.Tensor | None]:
    """Return the flow, the text states of the prompts, and the text states of the empty prompt."""
    model = open_image_model(folder, device(args.device), DTYPES[args.dtype])
    flow = model if isinstance(model, Flow) else model.transformer
    if isinstance(model, Flow) or not flow.config.text_dim:
        refuse({"--prompt": args.prompt}, f"{args.checkpoint} is not the folder of a text-to-image pipeline")
        return flow, None, None
    if model.text_encoder is None:
        raise ConfigError(f"{folder}: the pipeline has no text encoder")
    from ..data.prompts import encode_prompts

    prompts = args.prompt or DEFAULT_PROMPTS
    text = [encode_prompts(p, model.tokenizer, model.text_encoder, flow.config.text_len) for p in (prompts, [""])]
    return flow, *text


def _to_json(measured: Measurement) -> dict[str, Any]:
    blocks = [
        {"choice": str(block.choice), "trials": [dataclasses.asdict(trial) for trial in block.trials]}
        for block in measured.blocks
    ]
    times = {"seconds": measured.seconds, "sequential_seconds": measured.sequential_seconds}
    return {**dataclasses.asdict(measured.conditions), "machine": measured.machine, **times, "blocks": blocks}
