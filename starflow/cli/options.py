"""Options of sampling: guidance and solvers."""

from __future__ import annotations

import argparse
import math
import sys
from typing import get_args

from starflow_kernels.spec import GuidanceRule, Quantize

from ..errors import ConfigError
from ..inversion.request import METHODS, TOLERANCE, Inversion
from ..models.guidance import Guidance
from ..sampling.processes import Processes
from .common import Parser, device, non_empty, positive, refuse


def process_device(name: str) -> str:
    """Return the device of this process, see `device`; under torchrun, each process has its own GPU."""
    name, processes = device(name), Processes()
    return f"cuda:{processes.local_rank}" if name == "cuda" and processes.count > 1 else name


def denoise_argument(parser: argparse._ActionsContainer) -> None:
    """Add --denoise."""
    parser.add_argument(
        "--denoise",
        type=float,
        metavar="FACTOR",
        help="Factor of a denoising step after sampling, usually 1; 0 means none. Default: 0, or the pipeline's own.",
    )


def label_argument(parser: argparse._ActionsContainer) -> None:
    """Add --label."""
    parser.add_argument(
        "--label",
        metavar="CLASS",
        help="Class to draw; all draws each class in turn, none draws without a class. Default: all.",
    )


def prompt_file_argument(parser: argparse._ActionsContainer) -> None:
    """Add --prompt-file."""
    parser.add_argument(
        "--prompt-file",
        type=non_empty,
        metavar="FILE",
        help="File with one prompt per line; empty lines do not count.",
    )


def temperature_argument(parser: argparse._ActionsContainer) -> None:
    """Add --attention-temperature."""
    parser.add_argument(
        "--attention-temperature",
        "--attn_temp",
        type=float,
        default=1.0,
        metavar="X",
        help="Attention temperature of the branch without a condition. Default: 1.",
    )


def guidance_arguments(parser: argparse._ActionsContainer, described: str) -> None:
    """Add --guidance, --guidance-rule and --annealed, see `read_guidance`.

    Args:
        parser: the command's parser, or a group of it.
        described: the default weight in the help text.
    """
    parser.add_argument(
        "--guidance",
        "--cfg",
        type=float,
        metavar="WEIGHT",
        help=f"Guidance weight; 0 samples without guidance. Default: {described}.",
    )
    parser.add_argument(
        "--guidance-rule",
        choices=get_args(GuidanceRule),
        help="Formula of the guidance. Default: tarflow, or starflow for text.",
    )
    parser.add_argument(
        "--annealed",
        action="store_true",
        help="Let the guidance weight grow over the tokens of each block. Default: the same weight at all tokens.",
    )


def read_guidance(args: argparse.Namespace, default: Guidance, temperature: float = 1.0) -> Guidance:
    """Return the guidance that the arguments ask for.

    Args:
        args: the parsed arguments.
        default: guidance without arguments.
        temperature: attention temperature.

    Raises:
        ConfigError: a value is out of range, or has no effect.
    """
    if args.guidance is not None and not 0 <= args.guidance < math.inf:
        raise ConfigError(f"--guidance {args.guidance:g}: expected a finite weight of at least 0")
    weight = default.weight if args.guidance is None else args.guidance
    chosen = Guidance(weight, args.guidance_rule or default.rule, args.annealed, temperature)
    given = {
        "--guidance-rule": args.guidance_rule,
        "--annealed": args.annealed,
        "--attention-temperature": temperature != 1,
    }
    if not weight:
        refuse(given, "there is no guidance, see --guidance")
    return chosen


def solver_arguments(parser: Parser) -> None:
    """Add the arguments that choose the solvers, ours and the flags of the upstream code, see `read_inversion`."""
    solver = parser.add_argument_group("solver")
    solver.add_argument(
        "--method",
        metavar="NAME",
        help=f"Solver of the blocks: {', '.join(METHODS)} or auto, which takes the fastest one that starflow calibrate "
        "measured for each block, or sequential. Default: auto.",
    )
    solver.add_argument(
        "--window", type=positive, metavar="N", help="Number of tokens that jacobi solves together. Default: all."
    )
    solver.add_argument(
        "--tol",
        type=float,
        metavar="X",
        help=f"Largest change of a token at which jacobi stops. Default: {TOLERANCE:g}.",
    )
    solver.add_argument(
        "--quantize",
        choices=get_args(Quantize),
        default="none",
        help="Round the weights to one byte per value, or weights and inputs of products to bfloat16. This changes the "
        "images. Default: none.",
    )
    upstream = parser.add_argument_group(
        "flags of the upstream code", "They choose the jacobi solver. Its images are exact to --tol nevertheless."
    )
    upstream.add_argument(
        "--jacobi", type=int, choices=(0, 1), default=0, help="With 1, same as --method jacobi. Default: 0."
    )
    upstream.add_argument(
        "--jacobi_block_size", type=positive, metavar="N", help="Same as --window N. Default: all tokens."
    )
    upstream.add_argument(
        "--jacobi_th",
        type=float,
        metavar="X",
        help=f"Same as --tol sqrt(X), if that is below {TOLERANCE:g}. Default: --tol.",
    )
    upstream.add_argument(
        "--jacobi_max_iter",
        type=positive,
        metavar="N",
        help="Ignored: jacobi iterates until it reaches --tol. Default: no limit.",
    )


def read_inversion(args: argparse.Namespace) -> Inversion:
    """Read method, window and tolerance from our flags or the upstream ones."""
    threshold = args.jacobi_th
    if threshold is not None and not 0 <= threshold < math.inf:
        raise ConfigError(f"--jacobi_th {threshold}: expected a finite number of at least 0")
    if not args.jacobi:
        return Inversion(args.method or "auto", args.window, args.tol, args.quantize)
    if args.method not in (None, "jacobi"):
        raise ConfigError(f"--jacobi 1 and --method {args.method}: give one of them")
    refuse({"--jacobi_block_size": args.window and args.jacobi_block_size}, "--window is given")
    refuse({"--jacobi_th": None if args.tol is None else threshold}, "--tol is given")
    tol = args.tol
    if threshold is not None:
        # The upstream rule, mean dx^2 < X mean x^2, holds for values around 1 if no |dx| exceeds sqrt(X).
        tol = min(TOLERANCE, math.sqrt(threshold))
    if threshold is not None or args.jacobi_max_iter is not None:
        exact = TOLERANCE if tol is None else tol
        print(f"starflow sample: jacobi iterates to --tol {exact:g}, not to the upstream threshold", file=sys.stderr)
    return Inversion("jacobi", args.window or args.jacobi_block_size, tol, args.quantize)
