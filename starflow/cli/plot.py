"""Command `starflow plot`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError
from ..io.files import check_writable, read_lines, write_atomically
from ..training.loop import METRICS, SAMPLES
from .common import Parser, non_empty

EXAMPLE = "starflow plot runs/digits"
FILE = "plot.png"
# Metrics of flows, autoencoders and decoders in the order of their curves -> title.
CURVES = {
    "loss": "loss (nats per dimension)",
    "bits_per_dim": "bits per dimension",
    "reconstruction": "reconstruction loss",
    "square": "mean squared error",
    "gradient_norm": "gradient norm",
    "learning_rate": "learning rate",
}
LOGARITHMIC = ("gradient_norm",)
# Grids of samples in the picture, the first and the last among them.
SHOWN_GRIDS = 4
INCHES = 4.0
PIXELS_PER_INCH = 120


def add_arguments(parser: Parser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("folder", type=non_empty, metavar="RUN", help="Folder of the run. Required.")
    parser.add_argument("--out", type=non_empty, metavar="FILE", help=f"PNG file to write. Default: RUN/{FILE}.")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Draw the metrics and samples of a run; return the file and what is in it."""
    folder = Path(args.folder)
    target = Path(args.out) if args.out else folder / FILE
    if target.suffix.lower() != ".png":
        raise ConfigError(f"--out {target}: expected a name that ends with .png")
    rows, grids = read_metrics(folder), sample_grids(folder)
    check_writable(target.parent)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("starflow plot needs matplotlib: pip install 'starflow-kernels[plot]'") from None
    curves = [name for name in CURVES if any(name in row for row in rows)]
    columns = max(len(curves), len(grids))
    figure = Figure(figsize=(INCHES * columns, INCHES * (1 + bool(grids))), dpi=PIXELS_PER_INCH, layout="constrained")
    axes = figure.subplots(1 + bool(grids), columns, squeeze=False)
    for place in axes.flat:
        place.set_axis_off()
    for place, name in zip(axes[0], curves):
        points = [(row["step"], row[name]) for row in rows if name in row]
        place.set_axis_on()
        place.plot(*zip(*points), linewidth=1)
        place.set(title=CURVES[name], xlabel="step")
        if name in LOGARITHMIC and all(value > 0 for _, value in points):
            place.set_yscale("log")
    if grids:
        from PIL import Image

        for place, path in zip(axes[1], grids):
            with Image.open(path) as image:
                place.imshow(image.convert("RGB"), interpolation="nearest")
            place.set_title(f"step {int(path.stem):,}")
    write_atomically(target, lambda temporary: figure.savefig(temporary, format="png"))
    print(f"{target}: {len(rows)} entries, {len(grids)} grids of samples")
    return {"file": str(target), "curves": curves, "entries": len(rows), "grids": [str(path) for path in grids]}


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Return the entries of a run's metrics.

    Args:
        folder: folder of the run.

    Raises:
        DataError: there are none.
    """
    path = folder / METRICS
    try:
        rows = [json.loads(line) for line in read_lines(path) if line.strip()]
    except FileNotFoundError:
        hint = "; of a pipeline, name a stage, such as RUN/flow" if folder.is_dir() else ""
        raise DataError(f"no {path}{hint}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}") from None
    if not any(name in row for row in rows if isinstance(row, dict) for name in CURVES):
        raise DataError(f"{path}: no metrics in it")
    for number, row in enumerate(rows, 1):
        named = isinstance(row, dict) and {name: row[name] for name in ("step", *CURVES) if name in row}
        if not named or "step" not in named or not all(type(value) in (int, float) for value in named.values()):
            raise DataError(f"{path}: entry {number} is no mapping of a step and metrics to numbers")
    return rows


def sample_grids(folder: Path) -> list[Path]:
    """Return up to SHOWN_GRIDS grids of samples of a run, evenly spaced over its steps.

    Args:
        folder: folder of the run.
    """
    found = sorted(path for path in (folder / SAMPLES).glob("*.png") if path.stem.isdecimal())
    if len(found) <= SHOWN_GRIDS:
        return found
    return [found[round(i * (len(found) - 1) / (SHOWN_GRIDS - 1))] for i in range(SHOWN_GRIDS)]
