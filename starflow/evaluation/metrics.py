"""Evaluation: likelihood, classification by Bayes' rule, and the exactness of a flow."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch.utils.data import DataLoader

from ..data.datasets import ImageSet, dequantize, generator
from ..models.flow import Flow

COARSE, FINE = 1e-2, 1e-3


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Mean bits a dimension of images under uniform dequantisation, its standard error over images, and how many."""

    bits_per_dim: float
    standard_error: float
    images: int


@dataclasses.dataclass(frozen=True)
class RoundTrip:
    """|difference| of values after both directions of the flow: largest, mean, and counts above 1e-3 and 1e-2."""

    max: float
    mean: float
    above_1e3: int
    above_1e2: int
    values: int


@torch.no_grad()
def likelihood(flow: Flow, images: ImageSet, draws: int = 8, batch_size: int = 256, seed: int = 0) -> Likelihood:
    """-log2 p a dimension (arXiv 2412.06329, section 3.1), an average over `draws` of the dequantisation noise.

    Uniform noise makes it an upper bound of the bits of the integer image; labels are the images' own where the flow is
    class-conditional.
    """
    bits = []
    for x, labels in _batches(flow, images, batch_size):
        random = generator(seed, len(bits))
        total = sum(_log_prob(flow, x, labels, random) for _ in range(draws)) / draws
        bits.append(-total / x[0].numel() / math.log(2) + math.log2(images.levels / 2))
    bits = torch.cat(bits).double()
    return Likelihood(bits.mean().item(), (bits.std() / math.sqrt(len(bits))).item(), len(bits))


@torch.no_grad()
def bayes_accuracy(
    flow: Flow, images: ImageSet, prior: torch.Tensor, draws: int = 8, batch_size: int = 256, seed: int = 0
) -> float:
    """Fraction of images whose own class maximises p(x | y) p(y); p(x | y) is averaged over `draws` of the noise.

    prior: (num_classes,) probabilities of the classes.
    """
    right = 0
    for i, (x, labels) in enumerate(_batches(flow, images, batch_size)):
        scores = []
        for label in range(len(prior)):
            # The same noise for every class.
            random, tried = generator(seed, i), torch.full_like(labels, label)
            scores.append(torch.stack([_log_prob(flow, x, tried, random) for _ in range(draws)]).logsumexp(0))
        scores = torch.stack(scores, dim=1) + prior.log().to(flow.device)
        right += (scores.argmax(1) == labels).sum().item()
    return right / len(images)


@torch.no_grad()
def round_trips(flow: Flow, images: ImageSet, count: int = 64, seed: int = 0) -> dict[str, RoundTrip]:
    """inverse(forward(x)) against x of the first `count` images, and forward(inverse(z)) against noise z."""
    x, labels = next(_batches(flow, images, min(count, len(images))))
    labels = labels if flow.config.num_classes else None
    x = dequantize(x, images.levels, flow.config.noise_std, generator(seed)).to(flow.device, _dtype(flow))
    z = flow.noise(len(x), generator(seed, 1)).to(x.dtype)
    return {
        "inverse_of_forward": _round_trip(flow.inverse(flow(x, labels).z, labels), x),
        "forward_of_inverse": _round_trip(flow(flow.inverse(z, labels), labels).z, z),
    }


def logdet_error(flow: Flow, image: torch.Tensor, label: int | None = None, chunk: int = 256) -> float:
    """|log-determinant - log|det of the autograd Jacobian|| at one float image (C, H, W), in nats.

    Runs as many backward passes as the image has dimensions, `chunk` of them at a time.
    """
    dims, rows = image.numel(), []
    for outputs in torch.arange(dims, device=image.device).split(chunk):
        x = image.expand(len(outputs), *image.shape).clone().requires_grad_()
        labels = None if label is None else torch.full((len(outputs),), label, device=image.device)
        output = flow(x, labels)
        picked = output.z.flatten(1).gather(1, outputs.unsqueeze(1)).sum()
        rows.append(torch.autograd.grad(picked, x)[0].flatten(1))
    jacobian = torch.cat(rows).double()
    return abs(torch.linalg.slogdet(jacobian).logabsdet.item() - output.logdet[0].item())


def _dtype(flow: Flow) -> torch.dtype:
    return torch.promote_types(next(flow.parameters()).dtype, torch.float32)


def _batches(flow: Flow, images: ImageSet, batch_size: int):
    for x, labels in DataLoader(images, batch_size):
        yield x, labels.to(flow.device)


def _log_prob(flow: Flow, x: torch.Tensor, labels: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    noisy = dequantize(x, flow.config.levels, 0.0, random).to(flow.device, _dtype(flow))
    return flow.log_prob(noisy, labels if flow.config.num_classes else None)


def _round_trip(result: torch.Tensor, expected: torch.Tensor) -> RoundTrip:
    error = (result - expected).abs()
    above = [int((error > limit).sum()) for limit in (FINE, COARSE)]
    return RoundTrip(error.max().item(), error.mean().item(), *above, error.numel())
