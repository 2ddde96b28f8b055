"""Command line: starflow train | sample | eval | info."""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import torch

from starflow_kernels import backends

from . import data
from .checkpoint import resolve
from .errors import ConfigError, DataError, StarflowError
from .evaluation import bayes_accuracy, likelihood, logdet_error, round_trips
from .files import write_text
from .flow import Flow, Guidance
from .sampling import sample, save_grid, save_image
from .settings import PRESETS, override, presets, read_settings
from .training import SETTINGS, STATE, RunConfig, Trainer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class Parser(argparse.ArgumentParser):
    """Parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parser() -> Parser:
    """The parser of all commands."""
    root = Parser(prog="starflow", description="Train, sample and evaluate TarFlow and STARFlow models.")
    commands = root.add_subparsers(dest="command", required=True, parser_class=Parser)

    def command(name: str, run, help: str, example: str) -> Parser:
        sub = commands.add_parser(
            name,
            help=help,
            description=f"{help[0].upper()}{help[1:]}.",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        sub.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto takes a GPU where there is one")
        sub.add_argument("--threads", type=positive, help="CPU threads; small models are fastest with 1")
        sub.add_argument("--json", metavar="FILE", help="write what was measured as JSON; - prints it")
        return sub

    def checkpoint_arguments(sub: Parser) -> None:
        sub.add_argument("--checkpoint", default="digits", help="folder, or the bundled 'digits' (default)")
        sub.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the weights")
        sub.add_argument("--seed", type=non_negative, default=0, help="of all random numbers (default 0)")
        sub.add_argument("--batch-size", type=positive, default=256, help="images at a time (default 256)")

    train = command("train", run_train, "train a flow", "starflow train --preset digits --out runs/digits")
    source = train.add_mutually_exclusive_group(required=True)
    source.add_argument("--preset", choices=presets(), help="settings that come with the package")
    source.add_argument("--config", metavar="FILE", help="YAML with the sections model, data and training")
    source.add_argument("--resume", metavar="RUN", help="folder of a run to continue at its last checkpoint")
    train.add_argument("--set", metavar="SECTION.NAME=VALUE", action="append", default=[], help="change a setting")
    train.add_argument("--out", metavar="RUN", help="folder for checkpoint, metrics and sample grids")
    train.add_argument("--dtype", choices=("float32", "bfloat16"), help="bfloat16: autocast (default: the settings')")
    train.add_argument("--seed", type=non_negative, help="of all random numbers (default: the settings')")
    train.add_argument("--tensorboard", action="store_true", help="log to RUN/tensorboard too")
    train.add_argument("--quiet", action="store_true", help="no progress bar")

    draw = command("sample", run_sample, "draw images", "starflow sample --num 100 --label all --out samples")
    checkpoint_arguments(draw)
    draw.add_argument("--num", type=positive, default=100, help="number of images (default 100)")
    draw.add_argument("--label", default="all", help="class number, 'all' for each in turn (default), or 'none'")
    draw.add_argument("--guidance", type=float, default=0.0, help="guidance weight (default 0)")
    draw.add_argument("--guidance-rule", choices=("tarflow", "starflow"), default="tarflow")
    draw.add_argument("--annealed", action="store_true", help="let guidance grow over the tokens of a block")
    draw.add_argument("--attention-temperature", type=float, default=1.0, help="of the branch without a condition")
    draw.add_argument("--denoise", type=float, default=0.0, help="factor of the score step, about 1 (default 0: none)")
    draw.add_argument("--certify", action="store_true", help="report max |flow(x) - z| over the samples")
    draw.add_argument("--out", default="samples", help="folder for grid.png (default samples)")
    draw.add_argument("--images", action="store_true", help="write each image as a PNG too")

    evaluate = command("eval", run_eval, "evaluate a flow", "starflow eval --checkpoint runs/digits --json report.json")
    checkpoint_arguments(evaluate)
    evaluate.add_argument("--data", metavar="FOLDER", help="folder of images CLASS/*.png (default: the run's own data)")
    evaluate.add_argument("--split", choices=("held-out", "train"), default="held-out", help="of the run's own data")
    evaluate.add_argument("--draws", type=positive, default=8, help="draws of the dequantisation noise (default 8)")

    info = command("info", run_info, "describe a checkpoint and this machine", "starflow info --checkpoint runs/digits")
    info.add_argument("--checkpoint", default="digits", help="folder, or the bundled 'digits' (default)")
    return root


def positive(text: str) -> int:
    """argparse type: an integer of at least 1."""
    return _integer(text, 1)


def non_negative(text: str) -> int:
    """argparse type: an integer of at least 0."""
    return _integer(text, 0)


def _integer(text: str, low: int) -> int:
    if not text.lstrip("-").isdecimal() or int(text) < low:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {low}")
    return int(text)


def device(name: str) -> str:
    """Name of a device that is there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return name


def run_train(args: argparse.Namespace) -> dict[str, Any]:
    """starflow train"""
    if args.resume:
        if args.set or args.out or args.seed is not None or args.dtype:
            raise ConfigError("--resume continues with the settings of the run: drop --set, --out, --seed and --dtype")
        trainer = Trainer.resume(Path(args.resume), device(args.device), args.tensorboard)
    else:
        settings = read_settings(PRESETS / f"{args.preset}.yaml" if args.preset else Path(args.config))
        override(settings, args.set)
        if args.seed is not None:
            override(settings, [f"training.seed={args.seed}"])
        if args.dtype:
            override(settings, [f"training.bf16={'true' if args.dtype == 'bfloat16' else 'false'}"])
        folder = Path(args.out or f"runs/{args.preset or Path(args.config).stem}")
        if (folder / STATE).exists():
            raise ConfigError(f"{folder} holds a run: continue it with --resume {folder}, or choose another --out")
        trainer = Trainer(RunConfig.from_dict(settings), folder, device(args.device), args.tensorboard)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    start, first = time.perf_counter(), trainer.step
    try:
        trainer.run(args.quiet)
    except KeyboardInterrupt:
        print(
            f"stopped at step {trainer.step}; continue with: starflow train --resume {trainer.folder}", file=sys.stderr
        )
        raise
    seconds = time.perf_counter() - start
    print(f"{trainer.folder}: {trainer.step} steps, {seconds:.0f} s")
    last = trainer.metrics[-1] if trainer.metrics else {}
    return {"folder": str(trainer.folder), "steps": trainer.step - first, "seconds": seconds, "last": last}


def run_sample(args: argparse.Namespace) -> dict[str, Any]:
    """starflow sample"""
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


def run_eval(args: argparse.Namespace) -> dict[str, Any]:
    """starflow eval"""
    folder = resolve(args.checkpoint)
    flow = Flow.from_pretrained(folder, device(args.device), DTYPES[args.dtype])
    train, images = _evaluation_data(args, folder, flow)
    options = {"draws": args.draws, "batch_size": args.batch_size, "seed": args.seed}
    results: dict[str, Any] = {"images": len(images)}
    if flow.config.noise_std == 0:
        results["likelihood"] = dataclasses.asdict(likelihood(flow, images, **options))
        print("bits/dim {bits_per_dim:.4f} +- {standard_error:.4f} ({images} images)".format(**results["likelihood"]))
        if flow.config.num_classes:
            prior = torch.bincount(train.labels, minlength=flow.config.num_classes).double() / len(train)
            results["bayes_accuracy"] = bayes_accuracy(flow, images, prior, **options)
            print(f"Bayes accuracy {100 * results['bayes_accuracy']:.2f} %")
    for name, trip in round_trips(flow, images, seed=args.seed).items():
        results[name] = dataclasses.asdict(trip)
        print(
            "{}: max {max:.1e}, mean {mean:.1e}, above 1e-3 {above_1e3}, above 1e-2 {above_1e2} of {values}".format(
                name.replace("_", " "), **results[name]
            )
        )
    pixels, label = images[0]
    x = data.dequantise(pixels, flow.config.levels, flow.config.noise_std, data.generator(args.seed))
    exact = Flow.from_pretrained(folder, flow.device, torch.float64)
    label = label.item() if flow.config.num_classes else None
    results["logdet_error"] = logdet_error(exact, x.double().to(flow.device), label)
    print(f"log-determinant against the Jacobian, float64: {results['logdet_error']:.1e}")
    return results


def run_info(args: argparse.Namespace) -> dict[str, Any]:
    """starflow info"""
    flow = Flow.from_pretrained(args.checkpoint, device(args.device))
    rows, columns = flow.config.grid
    results = {
        "checkpoint": str(resolve(args.checkpoint)),
        "parameters": sum(p.numel() for p in flow.parameters()),
        "tokens": rows * columns,
        "token_dim": flow.config.token_dim,
        "config": flow.config.to_dict(),
        "backends": backends(),
    }
    for name, value in results.items():
        print(f"{name}: {json.dumps(value) if isinstance(value, dict) else value}")
    return results


def _labels(label: str, count: int, classes: int) -> torch.Tensor | None:
    if label == "none" or (label == "all" and not classes):
        return None
    if label == "all":
        return torch.arange(count) % classes
    if not label.isdecimal() or int(label) >= classes:
        allowed = f"0 .. {classes - 1}, 'all' or 'none'" if classes else "'none': the model has no classes"
        raise ConfigError(f"--label {label}: expected {allowed}")
    return torch.full((count,), int(label))


def _evaluation_data(args: argparse.Namespace, folder: Path, flow: Flow) -> tuple[data.ImageSet, data.ImageSet]:
    if args.data:
        config = data.DataConfig(source="folder", path=args.data, size=flow.config.image_size, held_out=0.0)
    elif (folder / SETTINGS).exists():
        config = RunConfig.from_dict(read_settings(folder / SETTINGS)).data
    else:
        raise DataError(f"{folder} has no {SETTINGS} that says what it was trained on: give --data FOLDER")
    train, held_out = data.load(config)
    images = train if args.data or args.split == "train" else held_out
    if not len(images):
        raise DataError(f"no images to evaluate on in the {args.split} part of {config.path or config.source}")
    if flow.config.num_classes and len(images.classes) > flow.config.num_classes:
        raise DataError(f"{len(images.classes)} classes of images, but the model has {flow.config.num_classes}")
    if images.levels != flow.config.levels:
        raise DataError(f"images of {images.levels} grey levels, but the model has {flow.config.levels}")
    return train, images


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 0, or 2 after an error that the user can mend, or 130 when interrupted."""
    args = parser().parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        results = args.run(args)
        if args.json:
            report = {
                "command": args.command,
                "arguments": {k: v for k, v in vars(args).items() if k not in ("run", "command", "json")},
                "versions": {"python": platform.python_version(), "torch": torch.__version__},
                "threads": torch.get_num_threads(),
                "results": results,
            }
            text = json.dumps(report, indent=2, default=str) + "\n"
            if args.json == "-":
                print(text, end="")
            else:
                write_text(Path(args.json), text)
    except StarflowError as error:
        print(f"starflow {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
