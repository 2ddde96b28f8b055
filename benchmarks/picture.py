"""Pictures of README.md and docs/, drawn from the bundled checkpoint and from benchmarks/results; needs matplotlib.

python -m benchmarks.picture
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt
from PIL import Image

from starflow import Flow
from starflow.seeds import generator

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "img"
RESULTS = ROOT / "benchmarks" / "results"
STYLES = ("-", "--", "-.", ":")
INK, GRAY, BLUE = "#1f2933", "#7b8794", "#2563eb"
# Numbers of blocks after which the samples are shown: the first ones do most of the work.
SHOWN_AFTER = (0, 1, 2, 3, 5, 8, 12)
SHOWN_DIGITS = (0, 2, 3, 5, 6, 8)


@torch.no_grad()
def states(flow: Flow, labels: torch.Tensor, seed: int) -> dict[int, torch.Tensor]:
    """Noise and the output of every block of one draw, block -> (N, 8, 8), in the order of sampling."""
    z = flow.noise(len(labels), generator(seed))
    found = {len(flow.blocks): z}

    def keep(block: int, x: torch.Tensor) -> torch.Tensor:
        found[block] = x
        return x

    flow.inverse(z, labels, after_block=keep)
    return {block: x[:, 0] for block, x in found.items()}


def tile(images: np.ndarray, rows: int, scale: int, gap: int = 6) -> np.ndarray:
    """Images (N, H, W) on [0, 1] as one (H', W') in rows, enlarged by an integer, with white gaps in pixels."""
    columns = len(images) // rows
    height, width = (side * scale for side in images.shape[1:])
    canvas = np.ones((rows * (height + gap) - gap, columns * (width + gap) - gap))
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = image.repeat(scale, 0).repeat(scale, 1)
    return canvas


def show(axes, image: np.ndarray, title: str) -> None:
    """Draw a gray image without axes, the title above its left edge."""
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(title, loc="left", fontsize=12, color=INK, pad=22)


def head_columns(axes, names: tuple[str, ...], width: int) -> None:
    """Write a name above each column of an image that is `width` pixels wide."""
    for i, name in enumerate(names):
        axes.text((i + 0.5) * width / len(names), -8, name, ha="center", va="bottom", color=GRAY, fontsize=9)


def measured(name: str) -> list[dict]:
    """Rows of a results file."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]


def draw_densities(data: str, axes) -> None:
    """Bits per dimension of the images for validation while flows train, and of codecs as lines."""
    rows = {row["case"].split(", ")[1]: row for row in measured("image_density_cpu") if row["case"].startswith(data)}
    for model, row in rows.items():
        if curve := row.get("validation"):
            minutes = [row["cpu_seconds"] * (i + 1) / len(curve) / 60 for i in range(len(curve))]
            axes.plot(minutes, curve, label=model)
    for (model, row), style in zip([each for each in rows.items() if "validation" not in each[1]], STYLES):
        axes.axhline(row["bits_per_dim"], color=GRAY, linewidth=1, linestyle=style, label=f"{model} (test images)")
    axes.set(title=data, xlabel="CPU time of training, minutes", ylabel="bits per dimension, images for validation")
    axes.legend(frameon=False)


def draw_speed(axes) -> None:
    """Bars of the time of plain PyTorch over ours."""
    rows = [row for row in measured("sampling_cpu") if "ratio_plain" in row]
    names = [row["case"] for row in rows][::-1]
    ratios = [row["ratio_plain"] for row in rows][::-1]
    axes.barh(names, ratios, color=BLUE, height=0.62)
    axes.axvline(1, color=GRAY, linewidth=1, linestyle=":")
    for i, ratio in enumerate(ratios):
        axes.text(ratio + 0.01 * max(ratios), i, f"{ratio:.1f}x", va="center", color=INK, fontsize=12)
    axes.set_xlim(0, 1.15 * max(ratios))
    axes.tick_params(axis="y", length=0, labelsize=11, colors=INK)
    axes.set_xticks([])
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title(
        "Sampling: times faster than plain PyTorch\nwith a KV cache, two CPU threads",
        loc="left",
        fontsize=12,
        color=INK,
        pad=6,
    )


def main() -> None:
    """Write the pictures."""
    torch.set_num_threads(1)
    matplotlib.rcParams["font.family"] = "DejaVu Sans"
    flow, labels = Flow.from_pretrained("digits"), torch.arange(10)
    count, found = len(flow.blocks), states(flow, labels, seed=1)
    # Noise has standard deviation 1; pixels lie on [-1, 1].
    spread = {after: 2.0 if after == 0 else 1.0 for after in SHOWN_AFTER}
    shown = {after: ((found[count - after] / spread[after] + 1) / 2).clamp(0, 1).numpy() for after in SHOWN_AFTER}
    path = tile(
        np.stack([shown[after][digit] for digit in SHOWN_DIGITS for after in SHOWN_AFTER]), len(SHOWN_DIGITS), 8
    )

    figure = plt.figure(figsize=(11.6, 4), dpi=120)
    axes = figure.add_axes((0, 0, 0.4, 0.88), anchor="SW")
    show(axes, path, "Noise becomes a digit, block by block")
    head_columns(axes, ("noise", *(f"{after}" for after in SHOWN_AFTER[1:-1]), f"{count} blocks"), path.shape[1])
    draw_speed(figure.add_axes((0.68, 0, 0.32, 0.84)))
    figure.savefig(IMAGES / "overview.png", bbox_inches="tight", facecolor="white")

    drawn = states(flow, labels.repeat(8), seed=0)[0]
    pixels = tile(((drawn + 1) / 2).clamp(0, 1).numpy(), 8, 10, 4)
    Image.fromarray((255 * pixels).round().astype(np.uint8)).save(IMAGES / "digits.png", optimize=True)

    figure, axes = plt.subplots(figsize=(7, 4.5), dpi=120, layout="constrained")
    draw_densities("emoji", axes)
    figure.savefig(IMAGES / "image_density.png", facecolor="white")


if __name__ == "__main__":
    main()
