"""Command `starflow sample`."""

from __future__ import annotations

import argparse
import functools
import math
import re
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigError, DataError
from ..inversion.request import Inversion
from ..io.files import check_writable, read_lines
from ..io.images import save_grid
from ..models.checkpoint import PIPELINE_INDEX, bundled_names
from ..models.flow import Flow
from ..models.guidance import Guidance
from ..opening import open_image_model
from ..sampling.budget import denoise_bytes, fitting_batch, image_bytes, weight_bytes
from ..sampling.jobs import FORMATS, SAMPLES_PER_FILE, Job, Layout
from ..sampling.many import GRID, GRID_IMAGES, DrawJobs, ProgressBar, draw_flow_jobs, generate
from ..sampling.processes import Processes
from ..sampling.sample import SampleOptions, SampleReport, check_pixels, sample
from .common import (
    DTYPES,
    Parser,
    byte_count,
    checkpoint_arguments,
    default_checkpoint,
    interrupted_by_sigterm,
    non_empty,
    positive,
    prompt_text,
    refuse,
    unicode_text,
)
from .options import (
    denoise_argument,
    guidance_arguments,
    label_argument,
    process_device,
    prompt_file_argument,
    read_guidance,
    read_inversion,
    solver_arguments,
    temperature_argument,
)

if TYPE_CHECKING:
    from ..pipelines import FlowPipeline

FLOW_BATCH = 256
PIPELINE_BATCH = 8
MEMORY = 2_000_000_000
# The list of the samples of a run is in memory.
MOST_SAMPLES = 10_000_000
DEFAULT_FOLDER = "samples"
FOLDER_CHARACTERS = 80
# Arguments that only pipelines take, by the name that the parser gives them.
PIPELINE_ONLY = ("prompt", "prompt_file", "negative_prompt", "aspect", "height", "width")

EXAMPLE = "starflow sample --num 100 --label all --out samples"


def add_arguments(parser: Parser) -> None:
    """Add the arguments of this command."""
    checkpoint_arguments(
        parser,
        batch_size=f"{FLOW_BATCH}, or {PIPELINE_BATCH} for a pipeline; auto takes what fits --memory",
        auto=True,
        default=None,
    )
    parser.add_argument(
        "--memory",
        type=byte_count,
        metavar="SIZE",
        help="Memory for the weights and one batch, such as 8GB; it determines the batch size. Default: 2GB, if "
        "--batch-size is auto.",
    )
    parser.add_argument(
        "--num",
        "--count",
        type=positive,
        metavar="N",
        help="Number of images, or of images per prompt. Under torchrun, use --count. Default: 100, or 1 per prompt.",
    )
    denoise_argument(parser)
    parser.add_argument(
        "--certify",
        action="store_true",
        help="Map the images back to noise and report the largest difference. Default: no report.",
    )
    parser.add_argument(
        "--verbose",
        action="store_true",
        help="Print the time of each stage and a line per block. Default: print the result alone.",
    )
    conditions = parser.add_argument_group("conditions and guidance")
    condition = conditions.add_mutually_exclusive_group()
    label_argument(condition)
    condition.add_argument(
        "--prompt",
        type=prompt_text,
        metavar="TEXT",
        help="Text to draw, with a text-to-image pipeline. It needs this or --prompt-file.",
    )
    prompt_file_argument(condition)
    conditions.add_argument(
        "--negative-prompt",
        type=unicode_text,
        metavar="TEXT",
        help="Prompt that guidance moves away from. Default: the empty prompt.",
    )
    guidance_arguments(conditions, "0, or the pipeline's own")
    temperature_argument(conditions)
    pipelines = parser.add_argument_group("pipelines")
    pipelines.add_argument(
        "--aspect",
        metavar="W:H",
        help="Aspect ratio of the images, such as 3:2, at the area of the training images. Default: as in training.",
    )
    pipelines.add_argument(
        "--height", type=positive, metavar="PIXELS", help="Height of the images. Default: as in training."
    )
    pipelines.add_argument(
        "--width", type=positive, metavar="PIXELS", help="Width of the images. Default: as in training."
    )
    pipelines.add_argument(
        "--variant",
        type=non_empty,
        metavar="NAME",
        help="Variant of a pipeline's weight files, such as fp16. Default: none.",
    )
    solver_arguments(parser)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--out",
        type=non_empty,
        metavar="FOLDER",
        help="Folder for the images. Default: samples, or samples/PROMPT-SEED with --prompt.",
    )
    files.add_argument(
        "--format",
        choices=FORMATS,
        help="Write one PNG per image, or files of many images. Default: one grid.png; png for pipelines or torchrun.",
    )
    files.add_argument(
        "--images",
        dest="format",
        action="store_const",
        const="png",
        help="Same as --format png. Default: as --format says.",
    )
    files.add_argument(
        "--samples-per-file",
        type=positive,
        metavar="N",
        help=f"Number of images per npz or safetensors file. Default: {SAMPLES_PER_FILE}.",
    )
    files.add_argument(
        "--latents",
        action="store_true",
        help="Write the output of the flow; needs --format safetensors. Default: write pixels.",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Draw images with a flow or a pipeline."""
    return draw(args)[0]


def draw(args: argparse.Namespace) -> tuple[dict[str, Any], list[Path]]:
    """Draw images with a flow or a pipeline; return the results and the files of the samples."""
    inversion = read_inversion(args)
    if args.checkpoint is None:
        texts = args.prompt, args.prompt_file, args.negative_prompt
        args.checkpoint = default_checkpoint(text=any(text is not None for text in texts))
    args.out = args.out or _default_folder(args.prompt, args.seed)
    check_writable(Path(args.out))
    # Joined before the model is loaded, which may take a different time in each process.
    Processes().join()
    model = open_image_model(args.checkpoint, process_device(args.device), DTYPES[args.dtype], args.variant)
    return (_flow if isinstance(model, Flow) else _pipeline)(args, model, inversion)


def _default_folder(prompt: str | None, seed: int) -> str:
    """Return the folder of a command without --out; each prompt and seed has its own."""
    if prompt is None:
        return DEFAULT_FOLDER
    words, room = re.findall(r"\w+", prompt.lower()), FOLDER_CHARACTERS - len(str(seed))
    while sum(len(word) + 1 for word in words) > room and len(words) > 1:
        words.pop()
    return f"{DEFAULT_FOLDER}/{'-'.join([word[:room] for word in words] + [str(seed)])}"


def _flow(args: argparse.Namespace, flow: Flow, inversion: Inversion) -> tuple[dict[str, Any], list[Path]]:
    reason = f"{args.checkpoint} is not the folder of a pipeline, it has no {PIPELINE_INDEX}"
    refuse(_flags(args, *PIPELINE_ONLY), reason)
    count = args.num or 100
    if not args.latents:
        check_pixels(flow)
    labels, columns = _labels(args.label, count, flow.config.num_classes)
    guidance = read_guidance(args, Guidance(), args.attention_temperature)
    options = SampleOptions(guidance, inversion, args.denoise or 0.0, args.certify)
    each = image_bytes(flow, guidance, inversion, certify=args.certify)
    fixed, tokens = weight_bytes([flow]), math.prod(flow.config.grid)
    values, denoising = tokens * flow.config.token_dim, denoise_bytes(flow, tokens) if args.denoise else 0
    if args.format or args.latents or Processes().count > 1:
        layout = _layout(args)
        batch_size = _batch_size(args, FLOW_BATCH, fixed + denoising + layout.held_bytes(values), each + values)
        draw_jobs = functools.partial(draw_flow_jobs, flow=flow, options=options, latents=args.latents)
        return _generate(args, draw_jobs, _jobs(labels), options, {}, batch_size, columns, layout, flow.device)
    refuse(_flags(args, "samples_per_file"), "all images are in one grid, see --format")
    # The noise and images of all batches are in memory: a float and a byte per value.
    batch_size = _batch_size(args, FLOW_BATCH, fixed + 5 * count * values, max(each, denoising))
    given = None if labels[0] is None else torch.tensor(labels, dtype=torch.int64, device="cpu")
    with ProgressBar(count) as bar:
        images, report = sample(
            flow,
            count,
            given,
            seed=args.seed,
            batch_size=batch_size,
            options=options,
            progress=bar.of_batch(0, count),
        )
    grid = Path(args.out) / GRID
    save_grid(images, grid, columns)
    _print(report, grid, args.verbose)
    return {"grid": str(grid), "options": options.to_json(), **report.to_json()}, []


def _pipeline(args: argparse.Namespace, pipe: FlowPipeline, inversion: Inversion) -> tuple[dict[str, Any], list[Path]]:
    from ..data.prompts import nearest_ratio, warn_of_unknown_words

    guidance = read_guidance(args, pipe.default_guidance, args.attention_temperature)
    options = SampleOptions(guidance, inversion, pipe.denoise_factor(args.denoise), args.certify)
    flow, size = pipe.transformer, pipe.size(args.height, args.width, args.aspect)
    if size != (trained := pipe.size(None, None, None)) and not pipe.config.get("mixed_aspect"):
        message = "the model was trained on images of {1}x{0} pixels alone; others may be broken".format(*trained)
        warnings.warn(message, stacklevel=2)
    condition_options = {}
    if flow.config.text_dim:
        refuse(_flags(args, "label"), "this pipeline draws text, see --prompt")
        prompts, copies = _prompts(args), args.num or 1
        _check_count(len(prompts) * copies)
        jobs = [Job(i, copy, prompt) for i, prompt in enumerate(prompts) for copy in range(copies)]
        columns = min(copies, 10) if min(copies, len(prompts)) > 1 else math.ceil(math.sqrt(len(jobs)))
        ratio = args.aspect or nearest_ratio(*size)
        condition_options = {"ratio": ratio, "negative_prompt": args.negative_prompt}
        if pipe.tokenizer is not None and Processes().rank == 0:
            warn_of_unknown_words([*prompts, args.negative_prompt or ""], pipe.tokenizer)
    else:
        refuse(_flags(args, "prompt", "prompt_file", "negative_prompt"), "this pipeline takes no text, see --label")
        labels, columns = _labels(args.label, args.num or 100, flow.config.num_classes)
        jobs = _jobs(labels)
    layout, pixels = _layout(args), 3 * math.prod(size)
    multiple = flow.config.patch_size * pipe.pixels_per_latent
    grid = size[0] // multiple, size[1] // multiple
    fixed = weight_bytes(part for part in pipe.components.values() if isinstance(part, torch.nn.Module))
    # Denoising takes one image at a time.
    fixed += (denoise_bytes(flow, math.prod(grid)) if options.denoise else 0) + layout.held_bytes(pixels)
    each = image_bytes(flow, guidance, inversion, grid, args.certify, pixels)
    batch_size = _batch_size(args, PIPELINE_BATCH, fixed, each)
    draw_jobs = functools.partial(pipe.draw_jobs, options=options, size=size, latents=args.latents, **condition_options)
    asked = {name: getattr(args, name) for name in ("aspect", "height", "width", "negative_prompt")}
    return _generate(args, draw_jobs, jobs, options, asked, batch_size, columns, layout, flow.device)


def _generate(
    args: argparse.Namespace,
    draw_jobs: DrawJobs,
    jobs: list[Job],
    options: SampleOptions,
    asked: dict[str, Any],
    batch_size: int,
    columns: int,
    layout: Layout,
    device: torch.device,
) -> tuple[dict[str, Any], list[Path]]:
    """Draw images into files, together with the other processes of torchrun if there are any."""
    settings = {"checkpoint": _place(args.checkpoint), "dtype": args.dtype, "variant": args.variant}
    try:
        with interrupted_by_sigterm():
            report = generate(
                draw_jobs,
                jobs,
                Path(args.out),
                args.seed,
                batch_size,
                {**settings, **options.to_json(), **asked},
                device=device,
                columns=min(columns, len(jobs)),
                layout=layout,
            )
    except KeyboardInterrupt:
        print(f"stopped; the same command continues in {args.out}", file=sys.stderr)
        raise
    files = [Path(args.out, file.name) for file in layout.files(jobs)]
    if Processes().rank:
        args.json = None
        return {}, files
    has_grid = layout.format == "png" and len(jobs) <= GRID_IMAGES
    _print(report, Path(args.out, GRID if has_grid else ""), args.verbose)
    return {"out": args.out, "options": options.to_json(), **report.to_json()}, files


def _print(report: SampleReport, where: Path, verbose: bool) -> None:
    """Print the place and the report of the images, and with `verbose` a line for the stages and one per block."""
    print(f"{where}: {report}")
    if verbose:
        print("stages: " + ", ".join(f"{name} {seconds:.3f} s" for name, seconds in report.stages.items() if seconds))
        for i, block in reversed(list(enumerate(report.blocks))):
            print(f"block {i}: {block}")


def _place(checkpoint: str) -> str:
    """Return the absolute path of a folder, or the name of a bundled checkpoint."""
    return checkpoint if checkpoint in bundled_names() else str(Path(checkpoint).resolve())


def _flags(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return the value of each flag."""
    return {"--" + name.replace("_", "-"): getattr(args, name) for name in names}


def _layout(args: argparse.Namespace) -> Layout:
    """Return how the samples are written."""
    layout = Layout(args.format or "png", args.samples_per_file or SAMPLES_PER_FILE, args.latents)
    if layout.format == "png":
        refuse(_flags(args, "samples_per_file"), "every image has a file of its own, see --format")
    return layout


def _jobs(labels: list[int | None]) -> list[Job]:
    """Return one job per label; `copy` counts the jobs with the same label."""
    jobs, drawn = [], {}
    for label in labels:
        jobs.append(Job(label or 0, drawn.get(label, 0), label))
        drawn[label] = drawn.get(label, 0) + 1
    return jobs


def _batch_size(args: argparse.Namespace, default: int, fixed: int, each: int) -> int:
    """Return the requested batch size, or the one that fits beside `fixed` bytes with `each` bytes per image."""
    if args.memory is None and args.batch_size != "auto":
        return args.batch_size or default
    if isinstance(args.batch_size, int):
        raise ConfigError(f"--memory and --batch-size {args.batch_size}: give one of them")
    return fitting_batch(args.memory or MEMORY, fixed, each)


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.prompt is not None:
        return [args.prompt]
    if args.prompt_file is None:
        raise ConfigError("--prompt or --prompt-file: this pipeline draws text")
    try:
        lines = read_lines(Path(args.prompt_file))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompt-file {args.prompt_file}: {getattr(error, 'strerror', None) or error}") from None
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise DataError(f"--prompt-file {args.prompt_file}: no prompts in it")
    return prompts


def _check_count(count: int) -> None:
    if count > MOST_SAMPLES:
        raise ConfigError(f"--num: {count} images, a run draws at most {MOST_SAMPLES}")


def _labels(label: str | None, count: int, classes: int) -> tuple[list[int | None], int]:
    """Return the class of each image, and the number of images per row of a grid."""
    _check_count(count)
    label, columns = "all" if label is None else label, min(count, 10)
    if label == "none" or (label == "all" and not classes):
        return [None] * count, columns
    if label == "all":
        return [i % classes for i in range(count)], classes if classes <= 20 else columns
    if not re.fullmatch(r"\d{1,9}", label) or int(label) >= classes:
        allowed = f"0 .. {classes - 1}, 'all' or 'none'" if classes else "'none': the model has no classes"
        raise ConfigError(f"--label {label}: expected {allowed}")
    return [int(label)] * count, columns
