"""starflow sample"""

from __future__ import annotations

import argparse
import dataclasses
import math
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from starflow_kernels.spec import Quantize

from ..errors import ConfigError, DataError
from ..inversion.solvers import METHODS, TOLERANCE, BlockReport, Inversion
from ..models.checkpoint import PIPELINE_INDEX
from ..models.flow import Flow, Guidance
from ..sampling.budget import denoise_bytes, fitting_batch, image_bytes, weight_bytes
from ..sampling.ledger import FORMATS, SHARD_SIZE, Job, Layout
from ..sampling.many import GenerationReport, generate
from ..sampling.processes import Processes
from ..sampling.sample import SampleReport, check_pixels, sample, save_grid
from .common import DTYPES, Parser, byte_count, checkpoint_arguments, device, non_negative, positive

if TYPE_CHECKING:
    from ..pipelines import FlowPipeline

FLOW_BATCH, PIPELINE_BATCH = 256, 8
MEMORY = 2_000_000_000
# Arguments that only a pipeline has, by the name that the parser gives them.
PIPELINE_ONLY = ("prompt", "prompt_file", "negative_prompt", "aspect", "height", "width", "variant")

HELP = "draw images"
EXAMPLE = "starflow sample --num 100 --label all --out samples"


def add_arguments(parser: Parser) -> None:
    """The arguments of this command."""
    checkpoint_arguments(
        parser, batch_size=f"{FLOW_BATCH}; {PIPELINE_BATCH} of a pipeline; auto fits --memory", auto=True
    )
    parser.add_argument(
        "--memory", type=byte_count, metavar="SIZE", help="of weights and a batch, in each process, 8GB say (auto: 2GB)"
    )
    parser.add_argument(
        "--num",
        "--count",
        type=positive,
        help="images in all, or of each prompt (default 100, or 1); torchrun: --count",
    )
    condition = parser.add_mutually_exclusive_group()
    condition.add_argument("--label", default="all", help="class number, 'all' for each in turn (default), or 'none'")
    condition.add_argument("--prompt", help="text to draw, of a text-to-image pipeline")
    condition.add_argument("--prompt-file", metavar="FILE", help="one prompt a line; empty lines do not count")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what guidance moves away from (default: nothing)")
    parser.add_argument("--aspect", metavar="W:H", help="shape of the images at the area of training, 3:2 say")
    parser.add_argument("--height", type=positive, help="in pixels (default: that of training)")
    parser.add_argument("--width", type=positive, help="in pixels (default: that of training)")
    parser.add_argument("--guidance", "--cfg", type=float, help="guidance weight (default 0, or 3.6 for prompts)")
    parser.add_argument(
        "--guidance-rule", choices=("tarflow", "starflow"), help="(default tarflow, or starflow for prompts)"
    )
    parser.add_argument("--annealed", action="store_true", help="let guidance grow over the tokens of a block")
    parser.add_argument(
        "--attention-temperature", "--attn_temp", type=float, default=1.0, help="of the branch without a condition"
    )
    parser.add_argument(
        "--method",
        help=f"{' or '.join(METHODS)}; auto (default): the fastest as `starflow calibrate` found it, or sequential",
    )
    parser.add_argument("--window", type=positive, metavar="N", help="tokens at a time of jacobi (default: all)")
    parser.add_argument(
        "--tol", type=float, metavar="X", help=f"largest change of a token that jacobi accepts (default {TOLERANCE:g})"
    )
    parser.add_argument("--quantize", choices=get_args(Quantize), default="none", help="weights of one byte a value")
    parser.add_argument(
        "--denoise", type=float, help="factor of the score step, about 1, 0 for none (default: none, or the pipeline's)"
    )
    parser.add_argument("--certify", action="store_true", help="report how far the images' noise is from what they got")
    parser.add_argument("--variant", help="of the weights in a pipeline's folder, fp16 say")
    parser.add_argument("--out", default="samples", help="folder for the images or grid.png (default samples)")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="a PNG an image, or shards of many (default: png of a pipeline or under torchrun, else grid.png alone)",
    )
    parser.add_argument("--images", dest="format", action="store_const", const="png", help="--format png")
    parser.add_argument(
        "--shard-size", type=positive, default=SHARD_SIZE, metavar="N", help=f"of shards (default {SHARD_SIZE})"
    )
    parser.add_argument("--latents", action="store_true", help="what the flow made, not pixels; --format safetensors")
    released = parser.add_argument_group(
        "flags of the released code", "its approximation is not: images are exact to --tol whatever these say"
    )
    released.add_argument("--jacobi", type=non_negative, default=0, metavar="0|1", help="1: --method jacobi")
    released.add_argument("--jacobi_block_size", type=positive, metavar="N", help="--window N")
    released.add_argument(
        "--jacobi_th", type=float, metavar="X", help=f"--tol sqrt(X), where that is below {TOLERANCE:g}"
    )
    released.add_argument("--jacobi_max_iter", type=positive, metavar="N", help="no effect: sweeps go on to --tol")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Draw images, of a flow or of a pipeline."""
    inversion = _inversion(args)
    return (_pipeline if (Path(args.checkpoint) / PIPELINE_INDEX).exists() else _flow)(args, inversion)


def _inversion(args: argparse.Namespace) -> Inversion:
    """Method, window and tolerance of our flags, or of the released ones."""
    if not args.jacobi:
        return Inversion(args.method or "auto", args.window, args.tol, args.quantize)
    if args.method not in (None, "jacobi"):
        raise ConfigError(f"--jacobi {args.jacobi} and --method {args.method}: give one of them")
    tol = args.tol
    if tol is None and args.jacobi_th is not None:
        # The released rule, mean dx^2 < X mean x^2, holds where no |dx| of values around 1 exceeds the root.
        if not args.jacobi_th >= 0:
            raise ConfigError(f"--jacobi_th {args.jacobi_th}: expected a number of at least 0")
        tol = min(TOLERANCE, math.sqrt(args.jacobi_th))
    if args.jacobi_th is not None or args.jacobi_max_iter is not None:
        exact = TOLERANCE if tol is None else tol
        print(f"starflow sample: sweeps go on to --tol {exact:g}, not to the released threshold", file=sys.stderr)
    return Inversion("jacobi", args.window or args.jacobi_block_size, tol, args.quantize)


def _flow(args: argparse.Namespace, inversion: Inversion) -> dict[str, Any]:
    for name in PIPELINE_ONLY:
        if getattr(args, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag}: {args.checkpoint} is not the folder of a pipeline, it has no {PIPELINE_INDEX}")
    processes = Processes()
    flow = Flow.from_pretrained(args.checkpoint, _device(args.device, processes), DTYPES[args.dtype])
    classes, count = flow.config.num_classes, args.num or 100
    if not args.latents:
        check_pixels(flow)
    numbers = _labels(args.label, count, classes)
    guidance = Guidance(
        args.guidance or 0.0, args.guidance_rule or "tarflow", args.annealed, args.attention_temperature
    )
    each, fixed = image_bytes(flow, guidance, inversion, certify=args.certify), weight_bytes([flow])
    size, tokens = math.prod(flow.config.grid) * flow.config.token_dim, math.prod(flow.config.grid)
    columns = _columns(args.label, count, classes)
    if args.format or args.latents or processes.count > 1:
        if args.denoise:
            fixed += denoise_bytes(flow, tokens)
        layout = Layout(args.format or "png", args.shard_size, args.latents)
        batch_size = _batch_size(args, FLOW_BATCH, fixed + layout.held_bytes(size), each + size)
        options = {
            "guidance_scale": guidance.weight,
            "guidance_rule": guidance.rule,
            "annealed": guidance.annealed,
            "attention_temperature": guidance.temperature,
            **dataclasses.asdict(inversion),
            "denoise": args.denoise,
        }
        return _generate(args, flow, _jobs(numbers), options, batch_size, columns, layout)
    if args.denoise:
        each = max(each, denoise_bytes(flow, tokens))
    # All noise and all images are held, whatever the batch: a float and a byte of each value.
    batch_size = _batch_size(args, FLOW_BATCH, fixed + 5 * count * size, each)
    images, report = sample(
        flow,
        count,
        None if numbers[0] is None else torch.tensor(numbers),
        guidance,
        args.seed,
        batch_size,
        args.denoise or 0.0,
        args.certify,
        inversion=inversion,
    )
    out = Path(args.out)
    save_grid(images, out / "grid.png", columns)
    print(f"{out / 'grid.png'}: {report.count} images in {report.seconds:.2f} s{_exactness(report)}")
    _print_blocks(report.blocks)
    return {"grid": str(out / "grid.png"), "guidance": dataclasses.asdict(guidance), **dataclasses.asdict(report)}


def _pipeline(args: argparse.Namespace, inversion: Inversion) -> dict[str, Any]:
    from ..pipelines import FlowPipeline, STARFlowPipeline, hide_loading_bars

    hide_loading_bars()
    pipe = FlowPipeline.from_pretrained(args.checkpoint, dtype=DTYPES[args.dtype], variant=args.variant)
    pipe.to(_device(args.device, Processes()))
    options = {
        "guidance_scale": args.guidance,
        "guidance_rule": args.guidance_rule,
        "annealed": args.annealed,
        "attention_temperature": args.attention_temperature,
        **dataclasses.asdict(inversion),
        "denoise": args.denoise,
        "aspect_ratio": args.aspect,
        "height": args.height,
        "width": args.width,
        "negative_prompt": args.negative_prompt,
    }
    if isinstance(pipe, STARFlowPipeline):
        # An image at a time: its bits then do not depend on the batch, and memory is bounded.
        pipe.vae.enable_slicing()
        prompts, copies = _prompts(args), args.num or 1
        jobs = [Job(i, copy, prompt) for i, prompt in enumerate(prompts) for copy in range(copies)]
        columns = min(copies, 10) if copies > 1 else 10
    else:
        if given := [name for name in ("prompt", "prompt_file", "negative_prompt") if getattr(args, name) is not None]:
            raise ConfigError(f"--{given[0].replace('_', '-')}: this pipeline takes no text, use --label")
        classes, count = pipe.transformer.config.num_classes, args.num or 100
        jobs = _jobs(_labels(args.label, count, classes))
        columns = _columns(args.label, count, classes)
    layout = Layout(args.format or "png", args.shard_size, args.latents)
    fixed, each = _pipeline_bytes(args, pipe, inversion)
    fixed += layout.held_bytes(3 * math.prod(pipe.size(args.height, args.width, args.aspect)))
    return _generate(args, pipe, jobs, options, _batch_size(args, PIPELINE_BATCH, fixed, each), columns, layout)


def _generate(
    args: argparse.Namespace,
    source: Flow | FlowPipeline,
    jobs: list[Job],
    options: dict[str, Any],
    batch_size: int,
    columns: int,
    layout: Layout,
) -> dict[str, Any]:
    """Draw into files, by this process and those that torchrun started beside it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        report = generate(
            source,
            jobs,
            Path(args.out),
            args.seed,
            batch_size,
            {name: value for name, value in options.items() if value is not None},
            {"checkpoint": _place(args.checkpoint), "dtype": args.dtype, "variant": args.variant},
            args.certify,
            min(columns, len(jobs)),
            layout,
        )
    except KeyboardInterrupt:
        print(f"stopped; the same command continues in {args.out}", file=sys.stderr)
        raise
    if Processes().rank:
        args.json = None
        return {}
    kept = f" ({report.kept} were there)" if report.kept else ""
    stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in report.stages.items() if seconds)
    print(
        f"{args.out}: {report.count} images{kept} in {report.seconds:.2f} s"
        f"{f': {stages}' if stages else ''}{_exactness(report)}"
    )
    _print_blocks(report.blocks)
    return {"out": args.out, **dataclasses.asdict(report)}


def _place(checkpoint: str) -> str:
    """A folder wherever the command is run, or the name of a bundled checkpoint."""
    return str(path.resolve()) if (path := Path(checkpoint)).exists() else checkpoint


def _device(name: str, processes: Processes) -> str:
    """Of this process: each has a GPU of its own."""
    name = device(name)
    return f"cuda:{processes.local_rank}" if name == "cuda" and processes.count > 1 else name


def _jobs(numbers: list[int | None]) -> list[Job]:
    """A sample of each number, which counts those of its class."""
    jobs, drawn = [], {}
    for label in numbers:
        jobs.append(Job(label or 0, drawn.get(label, 0), label))
        drawn[label] = drawn.get(label, 0) + 1
    return jobs


def _batch_size(args: argparse.Namespace, default: int, fixed: int, each: int) -> int:
    """As asked for, or what fits beside `fixed` bytes with `each` an image."""
    if args.memory is None and args.batch_size != "auto":
        return args.batch_size or default
    if isinstance(args.batch_size, int):
        raise ConfigError(f"--memory and --batch-size {args.batch_size}: give one of them")
    return fitting_batch(args.memory or MEMORY, fixed, each)


def _pipeline_bytes(args: argparse.Namespace, pipe: FlowPipeline, inversion: Inversion) -> tuple[int, int]:
    """Bytes of the weights and of denoising, which takes an image at a time, and bytes of each image of a batch."""
    flow, size = pipe.transformer, pipe.size(args.height, args.width, args.aspect)
    multiple = flow.config.patch_size * pipe.pixels_a_latent
    grid = size[0] // multiple, size[1] // multiple
    # Prompts are guided unless that is turned off.
    weight = float(flow.config.text_dim > 0) if args.guidance is None else args.guidance
    fixed = weight_bytes(part for part in pipe.components.values() if isinstance(part, torch.nn.Module))
    if pipe.denoise_factor(args.denoise):
        fixed += denoise_bytes(flow, math.prod(grid))
    return fixed, image_bytes(flow, Guidance(weight), inversion, grid, args.certify, 3 * math.prod(size))


def _exactness(report: SampleReport | GenerationReport) -> str:
    if report.certificate is None:
        return ""
    return f", max |flow(x) - z| = {report.certificate:.1e}, mean {report.certificate_mean:.1e}"


def _print_blocks(blocks: list[BlockReport]) -> None:
    for i, block in reversed(list(enumerate(blocks))):
        print(f"block {i}: {block}")


def _columns(label: str, count: int, classes: int) -> int:
    return classes if label == "all" and 0 < classes <= 20 else min(count, 10)


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.prompt is not None:
        return [args.prompt]
    if args.prompt_file is None:
        raise ConfigError("--prompt or --prompt-file: this pipeline draws text")
    try:
        lines = Path(args.prompt_file).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompt-file {args.prompt_file}: {getattr(error, 'strerror', None) or error}") from None
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise DataError(f"--prompt-file {args.prompt_file}: no prompts in it")
    return prompts


def _labels(label: str, count: int, classes: int) -> list[int | None]:
    if label == "none" or (label == "all" and not classes):
        return [None] * count
    if label == "all":
        return [i % classes for i in range(count)]
    if not label.isdecimal() or int(label) >= classes:
        allowed = f"0 .. {classes - 1}, 'all' or 'none'" if classes else "'none': the model has no classes"
        raise ConfigError(f"--label {label}: expected {allowed}")
    return [int(label)] * count
