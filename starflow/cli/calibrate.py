"""starflow calibrate"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..inversion.measure import WINDOWS, calibrate
from ..inversion.solver_files import SETTINGS, save_calibration
from ..inversion.solvers import TOLERANCE, BlockMeasurement, Calibration, Inversion
from ..io.files import write_folder
from ..models.checkpoint import BUNDLED, PIPELINE_INDEX, resolve
from ..models.flow import Flow, Guidance
from ..training.loop import METRICS, STATE
from .common import DTYPES, Parser, device, non_negative, positive

TRANSFORMER = "transformer"

HELP = "measure the fastest exact solver of each block on this machine, for `starflow sample --method auto`"
EXAMPLE = "starflow calibrate --checkpoint runs/photos --batch-size 1 16"


def add_arguments(parser: Parser) -> None:
    """The arguments of this command."""
    parser.add_argument(
        "--checkpoint",
        "--model",
        default="digits",
        help="folder of a flow or pipeline, or the bundled 'digits' (default)",
    )
    parser.add_argument(
        "--batch-size", type=positive, nargs="+", default=[1, 16], metavar="N", help="images at a time (default 1 16)"
    )
    parser.add_argument("--tol", type=float, default=TOLERANCE, help=f"of the parallel solvers (default {TOLERANCE:g})")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the weights")
    parser.add_argument("--guidance", "--cfg", type=float, default=0.0, help="weight that images will be drawn with")
    parser.add_argument("--guidance-rule", choices=("tarflow", "starflow"), help="(default tarflow, starflow for text)")
    parser.add_argument("--annealed", action="store_true", help="let guidance grow over the tokens of a block")
    parser.add_argument("--prompt", nargs="+", default=["a photo"], help="what a text-to-image pipeline draws in turn")
    parser.add_argument(
        "--windows", type=non_negative, nargs="+", default=list(WINDOWS), metavar="N", help="to try, 0 for all tokens"
    )
    parser.add_argument("--seed", type=non_negative, default=0, help="of all random numbers (default 0)")
    parser.add_argument("--out", metavar="FOLDER", help="copy the checkpoint there, with the calibration")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print and store."""
    folder = Path(args.checkpoint)
    pipeline = (folder / PIPELINE_INDEX).exists()
    folder = folder if pipeline else resolve(folder)
    _check_target(args, folder)
    tol = Inversion("jacobi", tol=args.tol).tolerance
    flow, text, empty = (_pipeline if pipeline else _flow)(args, folder)
    rule = args.guidance_rule or ("starflow" if flow.config.text_dim else "tarflow")
    guidance = Guidance(args.guidance, rule, args.annealed)
    calibration = flow.calibration or Calibration(flow.config.grid, flow.config.token_dim)
    found = []
    for batch_size in sorted(set(args.batch_size)):
        print(f"batch {batch_size}:", flush=True)
        measured = calibrate(flow, batch_size, guidance, tol, args.windows, text, empty, args.seed, _tell)
        calibration = calibration.add(measured)
        before, after = measured.sequential_seconds, measured.seconds
        print(f"  all blocks: {_ms(before)} sequential, {_ms(after)} as chosen, {before / after:.2f}x")
        found.append(
            {
                **dataclasses.asdict(measured.conditions),
                "machine": measured.machine,
                "seconds": after,
                "sequential_seconds": before,
                "blocks": [
                    {"choice": str(block.choice), "trials": [dataclasses.asdict(trial) for trial in block.trials]}
                    for block in measured.blocks
                ],
            }
        )
    part = TRANSFORMER if pipeline else ""
    if args.out:
        with write_folder(Path(args.out)) as target:
            shutil.copytree(
                folder, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(STATE, METRICS, "samples")
            )
            save_calibration(calibration, target / part)
    else:
        save_calibration(calibration, folder / part)
    written = Path(args.out or folder, part, SETTINGS)
    print(f"written to {written}")
    return {"written": str(written), "measurements": found}


def _check_target(args: argparse.Namespace, folder: Path) -> None:
    """Before anything is measured: the result can be stored."""
    if args.out:
        if os.path.lexists(args.out):
            raise ConfigError(f"--out {args.out} exists already")
    elif BUNDLED in folder.parents:
        raise ConfigError(f"--out FOLDER: {args.checkpoint} comes with the package and stays as it is")
    elif not os.access(folder, os.W_OK):
        raise ConfigError(f"--out FOLDER: {folder} cannot be written to")


def _flow(args: argparse.Namespace, folder: Path) -> tuple[Flow, None, None]:
    return Flow.from_pretrained(folder, device(args.device), DTYPES[args.dtype]), None, None


def _pipeline(args: argparse.Namespace, folder: Path) -> tuple[Flow, torch.Tensor | None, torch.Tensor | None]:
    """The flow, states of the prompts, and those of the empty one."""
    from ..data.prompts import encode_prompts
    from ..pipelines import FlowPipeline, hide_loading_bars

    hide_loading_bars()
    pipe = FlowPipeline.from_pretrained(folder, dtype=DTYPES[args.dtype]).to(device(args.device))
    flow = pipe.transformer
    if not flow.config.text_dim:
        return flow, None, None
    if pipe.text_encoder is None:
        raise ConfigError(f"{folder}: the pipeline has no text encoder")
    states = [encode_prompts(p, pipe.tokenizer, pipe.text_encoder, flow.config.text_len) for p in (args.prompt, [""])]
    return flow, *states


def _tell(block: int, measured: BlockMeasurement) -> None:
    first, choice = measured.trials[0], measured.choice
    rivals = [trial for trial in measured.trials[1:] if trial.seconds is not None]
    line = f"  block {block}: {choice}, {_ms(choice.seconds)}, {choice.passes} passes"
    if choice is not first:
        line += f"; sequential {_ms(first.seconds)}"
    elif rivals:
        best = min(rivals, key=lambda trial: trial.seconds)
        line += f"; {best} {_ms(best.seconds)}, {best.passes} passes"
    print(line, flush=True)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
