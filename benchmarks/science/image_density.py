"""Bits per dimension of small images: a TarFlow beside codecs, a Gaussian and flows of zuko, on the same images.

    apt-get install fonts-noto-color-emoji dataset-fashion-mnist
    pip install 'starflow-kernels[adapters,emoji]' pillow-jxl-plugin
    python -m benchmarks.science.image_density --json benchmarks/results/image_density_cpu.json

A flow is trained for the same CPU time of all threads as the others, and keeps the parameters that were best on images
for validation. Test images serve the final figures alone. A flow's figure is an upper bound with uniform dequantization
noise (arXiv 2412.06329, section 3.1), and a tighter one with the mean density over `--draws` draws of it. A codec's
figure is the size of one file per image.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import zuko
from PIL import Image
from sklearn.covariance import ledoit_wolf
from torch import nn

from starflow import Flow, FlowConfig
from starflow.data.datasets import DataConfig, dequantize, load

from ..command import benchmark
from .flows import Peer, fit

LEVELS = 256
VALIDATION = 0.05
FASHION = Path("/usr/share/datasets/fashion-mnist")
EMOJI = {"image_size": 32, "image_channels": 3, "patch_size": 2, "channels": 128, "layers": (4, 4, 4, 4)}
TARFLOWS = {"emoji": EMOJI, "Fashion-MNIST": {**EMOJI, "image_size": 28, "image_channels": 1}}
PEERS = {
    "MAF": {"transforms": 3, "hidden_features": (512, 512)},
    "NSF": {"transforms": 3, "hidden_features": (512, 512)},
}
FLIPPED = {"emoji"}  # horizontal flips while training: shoes of Fashion-MNIST all point one way
# Images per step, and learning rate.
TRAINING = {"TarFlow": (8, 1e-3), "MAF": (32, 1e-3), "NSF": (32, 1e-3)}
CODECS = {
    "PNG": {"format": "PNG", "optimize": True},
    "WebP": {"format": "WEBP", "lossless": True, "quality": 100, "method": 6, "exact": True},
    "JPEG XL": {"format": "JXL", "lossless": True, "effort": 9},
}
CASES = [f"{data}, {model}" for data in TARFLOWS for model in (*CODECS, "Gaussian", *TRAINING)]


class Images(NamedTuple):
    """Images of a data set, uint8 (N, C, H, W), in three parts that no image shares."""

    train: torch.Tensor
    validation: torch.Tensor
    test: torch.Tensor


def emoji() -> Images:
    """Return emoji on white, as the package holds them out."""
    train, test = (torch.stack([row[0] for row in part]) for part in load(DataConfig(source="emoji", size=32)))
    return split(train, test)


def fashion(folder: Path = FASHION) -> Images:
    """Return the images of Fashion-MNIST (arXiv 1708.07747)."""
    files = (folder / f"{part}-images-idx3-ubyte.gz" for part in ("train", "t10k"))
    pixels = (np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8, offset=16) for file in files)
    return split(*(torch.tensor(each).view(-1, 1, 28, 28) for each in pixels))


def split(train: torch.Tensor, test: torch.Tensor) -> Images:
    """Take images for validation out of the training images."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    count = round(VALIDATION * len(train))
    return Images(train[order[count:]], train[order[:count]], test)


DATA: dict[str, Callable[[], Images]] = {"emoji": emoji, "Fashion-MNIST": fashion}


def bits(nats: torch.Tensor, dims: int) -> dict[str, float]:
    """Return the mean of -log2 p of integer images per dimension, and its standard error, from log p on [-1, 1]."""
    each = -nats.double() / dims / math.log(2) + math.log2(LEVELS / 2)
    return {"bits_per_dim": each.mean().item(), "error": each.std().item() / math.sqrt(len(each))}


def codec(images: torch.Tensor, options: dict) -> dict:
    """Return the bits per dimension of files."""
    if options["format"] == "JXL":
        import pillow_jxl  # noqa: F401
    sizes = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()).save(file, **options)
        back = np.asarray(Image.open(file).convert("RGB" if len(image) == 3 else "L"))
        assert (back == image.permute(1, 2, 0).squeeze(2).numpy()).all(), f"{options['format']} is not lossless"
        sizes.append(8 * file.tell() / image.numel())
    sizes = torch.tensor(sizes, dtype=torch.float64)
    return {"bits_per_dim": sizes.mean().item(), "error": sizes.std().item() / math.sqrt(len(sizes))}


def gaussian(images: Images) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the log density of a Gaussian with a shrunk covariance (Ledoit and Wolf 2004)."""
    x = dequantize(images.train, LEVELS, 0.0, torch.Generator().manual_seed(1)).flatten(1).double()
    covariance, _ = ledoit_wolf(x.numpy())
    normal = torch.distributions.MultivariateNormal(x.mean(0), torch.from_numpy(covariance))
    return lambda x: normal.log_prob(x.flatten(1).double())


class Flat(nn.Module):
    """A flow of zuko on images."""

    def __init__(self, kind: str, dims: int):
        super().__init__()
        self.flow = Peer(kind, dims, **PEERS[kind])

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        return self.flow.log_prob(x.flatten(1))


def build(data: str, kind: str, images: Images, sizes: dict) -> nn.Module:
    """Return an untrained flow."""
    if kind == "TarFlow":
        return Flow(FlowConfig(**{**TARFLOWS[data], **sizes}, levels=LEVELS))
    return Flat(kind, images.train[0].numel())


def train(
    flow: nn.Module, images: Images, seconds: float, batch: int, rate: float, flips: bool
) -> tuple[int, list[float]]:
    """Train for a CPU time, with or without flips of images.

    Returns:
        The number of steps, and the bits per dimension of the images for validation at each check.
    """
    random, curve = torch.Generator().manual_seed(0), []

    def loss() -> torch.Tensor:
        rows = torch.randint(len(images.train), (batch,), generator=random)
        x = dequantize(images.train[rows], LEVELS, 0.0, random)
        if flips:
            x = torch.where(torch.rand(batch, 1, 1, 1, generator=random) < 0.5, x.flip(3), x)
        return -flow.log_prob(x).mean() / x[0].numel()

    def validate() -> float:
        curve.append(
            bits(densities(flow.log_prob, images.validation[:500], 1)[0], images.train[0].numel())["bits_per_dim"]
        )
        return curve[-1]

    return fit(flow, loss, seconds, rate, validate), curve


@torch.no_grad()
def densities(log_prob: Callable, images: torch.Tensor, draws: int) -> torch.Tensor:
    """Return log densities (draws, N) of images with uniform noise."""
    random = torch.Generator().manual_seed(2)
    parts = images.split(100)
    return torch.stack([torch.cat([log_prob(dequantize(x, LEVELS, 0.0, random)) for x in parts]) for _ in range(draws)])


def measure(case: str, images: Images, args: argparse.Namespace) -> dict:
    """Return the row of a case."""
    data, model = case.split(", ")
    test, dims = images.test[: args.tests], images.train[0].numel()
    row = {"case": case, "images": len(test)}
    if model in CODECS:
        return row | codec(test, CODECS[model])
    if model == "Gaussian":
        log_prob = gaussian(images)
    else:
        torch.manual_seed(0)
        flow = build(data, model, images, args.sizes)
        steps, curve = train(flow, images, args.seconds, *TRAINING[model], data in FLIPPED)
        row |= {"cpu_seconds": args.seconds, "steps": steps, "validation": curve}
        row["parameters"] = sum(p.numel() for p in flow.parameters())
        log_prob = flow.eval().log_prob
    nats = densities(log_prob, test, args.draws)
    row |= bits(nats.mean(0), dims) | {"draws": args.draws}
    return row | {"bound_of_all_draws": bits(nats.logsumexp(0) - math.log(args.draws), dims)["bits_per_dim"]}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=7200, help="CPU time of the training of each flow")
    parser.add_argument("--tests", type=int, default=2000, help="test images at most")
    parser.add_argument("--draws", type=int, default=16, help="draws of the dequantization noise per image")
    parser.add_argument("--sizes", type=json.loads, default={}, help="other settings of the TarFlow, as JSON")


def results(args: argparse.Namespace) -> dict:
    rows, images = [], {}
    for case in args.cases:
        data = case.split(", ")[0]
        if data not in images:
            images[data] = DATA[data]()
        rows.append(measure(case, images[data], args))
        print(json.dumps(rows[-1]), flush=True)
    return {"machine": {"zuko": zuko.__version__}, "rows": rows}


main = benchmark(__doc__, results, options, cases=CASES)


if __name__ == "__main__":
    main()
