"""A small network that names concept, skin tone and gender of an emoji, trained on real emoji alone.

    python -m benchmarks.emoji.classifier --judge DIR

`DIR` keeps the trained network. It is trained again when the emoji, their images or the settings here have changed.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from starflow.seeds import generator

from .real import RealEmoji, ink, real_emoji

PARTS = ("concept", "tone", "gender")
FILE = "classifier.pt"
STEPS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 3000, 96, 3e-3, 0.02
# Largest changes of an augmented image: shift in parts of its side, scale, degrees, color, blur and noise in pixels.
AUGMENTATION = {"shift": 0.06, "scale": 0.1, "degrees": 8.0, "gain": 0.08, "offset": 0.02, "blur": 1.2, "noise": 0.06}


def blur(images: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Blur each image (B, C, H, W) by a Gaussian of its own standard deviation (B,) in pixels."""
    distance = torch.arange(-3.0, 4.0)
    kernels = torch.exp(-0.5 * (distance / sigma.clamp(min=0.05).unsqueeze(1)) ** 2)
    kernels = (kernels / kernels.sum(1, keepdim=True)).repeat_interleave(images.shape[1], 0).unsqueeze(1)
    flat, channels = images.flatten(0, 1).unsqueeze(0), len(kernels)
    flat = F.conv2d(flat, kernels.unsqueeze(2), padding=(0, 3), groups=channels)
    return F.conv2d(flat, kernels.unsqueeze(3), padding=(3, 0), groups=channels).view_as(images)


def augment(x: torch.Tensor, mirrored: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Return shifted, scaled, turned, mirrored, recolored, blurred and noisy images.

    Args:
        x: (B, 3, size, size) images, white is 0.
        mirrored: bool (B,) whether an image may be mirrored.
        random: source of the random numbers.
    """
    count, limits = len(x), AUGMENTATION

    def uniform(*shape: int) -> torch.Tensor:
        return 2 * torch.rand(count, *shape, generator=random) - 1

    angle, scale = math.radians(limits["degrees"]) * uniform(), torch.exp(limits["scale"] * uniform())
    across = torch.where(mirrored & (uniform() > 0), -1.0, 1.0)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    turn = torch.stack([torch.stack([cos * across, -sin], 1), torch.stack([sin * across, cos], 1)], 1)
    # The coordinates of grid_sample run from -1 to 1, so a side is 2.
    matrix = torch.cat([turn, 2 * limits["shift"] * uniform(2, 1)], 2)
    x = F.grid_sample(x, F.affine_grid(matrix, x.shape, align_corners=False), align_corners=False)
    x = x * (1 + limits["gain"] * uniform(3, 1, 1)) + limits["offset"] * uniform(1, 1, 1)
    x = blur(x, limits["blur"] * uniform().abs())
    noise = torch.randn(x.shape, generator=random)
    return (x + limits["noise"] * uniform(1, 1, 1).abs() * noise).clamp(0, 1)


class Residual(nn.Module):
    """Two convolutions beside an identity."""

    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = _convolution(width, width), _convolution(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(self.first(x))


def _convolution(before: int, after: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())


class Classifier(nn.Module):
    """Logits of concept, tone and gender of images (B, 3, size, size) in which white is 0.

    Args:
        classes: number of concepts, tones and genders.
        size: side of the images in pixels, a multiple of 32.
    """

    def __init__(self, classes: tuple[int, int, int], size: int):
        super().__init__()
        self.classes = classes
        self.body = nn.Sequential(
            nn.PixelUnshuffle(4), _convolution(48, 64), _convolution(64, 96, 2), Residual(96),
            _convolution(96, 192, 2), nn.AvgPool2d(2), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(192 * (size // 32) ** 2, sum(classes))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.head(self.body(x.contiguous(memory_format=torch.channels_last)))
        return logits.float().split(self.classes, 1)


def build(real: RealEmoji) -> Classifier:
    """Return a classifier of these emoji with random weights."""
    return Classifier(tuple(map(len, names(real))), real.images.shape[-1]).to(memory_format=torch.channels_last)


def names(real: RealEmoji) -> list[list[str]]:
    """Return the names of all concepts, tones and genders."""
    return [sorted({getattr(one, part) for one in real.emoji}) for part in PARTS]


def targets(real: RealEmoji) -> torch.Tensor:
    """Return int64 (N, 3) concepts, tones and genders; emoji with one image have those of the first of them."""
    found = [{name: i for i, name in enumerate(part)} for part in names(real)]
    rows = [[by[getattr(real.emoji[same], part)] for by, part in zip(found, PARTS)] for same in real.same]
    return torch.tensor(rows)


def train(real: RealEmoji, steps: int = STEPS, batch: int = BATCH, seed: int = 0) -> Classifier:
    """Train a classifier on augmented images.

    Args:
        real: the emoji.
        steps: optimizer steps.
        batch: images per step.
        seed: seed of weights, order and augmentation.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(real)
    x, goal, mirrored = ink(real.images), targets(real), real.mirrored()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=max(2, steps), pct_start=0.1)
    random, order, start = generator(seed), torch.empty(0, dtype=torch.int64), time.perf_counter()
    for step in range(steps):
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(len(real), generator=random)])
        rows, order = order[:batch], order[batch:]
        logits = model(augment(x[rows], mirrored[rows], random))
        loss = sum(F.cross_entropy(found, goal[rows, i]) for i, found in enumerate(logits))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"classifier: step {step}, loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    return model.eval()


@torch.no_grad()
def classify(model: Classifier, x: torch.Tensor) -> torch.Tensor:
    """Return int64 (B, 3) classes of images (B, 3, size, size), white is 0."""
    return torch.cat([torch.stack([found.argmax(1) for found in model(part)], 1) for part in x.split(256)])


def accuracy(model: Classifier, real: RealEmoji, seed: int = 1) -> dict[str, float]:
    """Return the shares of augmented images whose concept, tone, gender and all three are named right.

    Args:
        model: the classifier.
        real: the emoji.
        seed: seed of the augmentation, another one than that of training.
    """
    random, x, mirrored = generator(seed), ink(real.images), real.mirrored()
    parts = torch.arange(len(real)).split(256)
    found = torch.cat([classify(model, augment(x[rows], mirrored[rows], random)) for rows in parts])
    right = found == targets(real)
    shares = dict(zip(PARTS, right.double().mean(0).tolist()))
    return {**shares, "all": right.all(1).double().mean().item()}


def load_or_train(folder: Path, real: RealEmoji, **options: int) -> Classifier:
    """Return the classifier in a folder, trained and written first where there is none for these emoji.

    Args:
        folder: the folder.
        real: the emoji.
        options: arguments of `train`.
    """
    path, state = folder / FILE, {}
    key = repr([real.digest(), STEPS, BATCH, LEARNING_RATE, WEIGHT_DECAY, AUGMENTATION, options])
    if path.exists():
        state = torch.load(path, weights_only=True)
    if state.get("key") != key:
        model = train(real, **options)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"key": key, "weights": model.state_dict()}, path)
        return model
    model = build(real)
    model.load_state_dict(state["weights"])
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", type=Path, required=True, help="folder that keeps the classifier")
    parser.add_argument("--font", default="", help="font file; by default the one that fontconfig finds")
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    real = real_emoji(args.font, args.size)
    model = load_or_train(args.judge, real)
    print({name: round(share, 4) for name, share in accuracy(model, real).items()})


if __name__ == "__main__":
    main()
