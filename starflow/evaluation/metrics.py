"""Evaluation: likelihood, classification by Bayes' rule, and the exactness of a flow."""

from __future__ import annotations

import dataclasses
import math

import torch

from ..data.batches import batches
from ..data.datasets import ImageSet, dequantize
from ..errors import DataError
from ..models.flow import Flow
from ..seeds import generator

COARSE = 1e-2
FINE = 1e-3


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Likelihood of images under uniform dequantization.

    Args:
        bits_per_dim: mean bits per dimension.
        standard_error: standard error of that mean over the images.
        images: number of images.
    """

    bits_per_dim: float
    standard_error: float
    images: int


@dataclasses.dataclass(frozen=True)
class RoundTrip:
    """Absolute differences of values after both directions of the flow.

    Args:
        max: largest difference.
        mean: mean difference.
        above_1e3: number of differences above 1e-3.
        above_1e2: number of differences above 1e-2.
        values: number of values.
    """

    max: float
    mean: float
    above_1e3: int
    above_1e2: int
    values: int


@torch.no_grad()
def likelihood(flow: Flow, images: ImageSet, draws: int = 8, batch_size: int = 256, seed: int = 0) -> Likelihood:
    """Return bits per dimension, -log2 p (arXiv 2412.06329, section 3.1), averaged over the dequantization noise.

    With uniform noise, it is an upper bound on the bits per dimension of the integer images.

    Args:
        flow: flow to evaluate; a class-conditional one gets the class of each image.
        images: images to evaluate on.
        draws: draws of the noise per image.
        batch_size: images per batch.
        seed: seed of the noise.

    Raises:
        DataError: there are no images.
        ValueError: `draws` or `batch_size` is less than 1.
    """
    _check(images, draws=draws, batch_size=batch_size)
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
    """Return the fraction of images whose class maximizes p(x | y) p(y).

    Args:
        flow: class-conditional flow.
        images: images to classify.
        prior: (num_classes,) probabilities p(y).
        draws: draws of the dequantization noise, over which p(x | y) is averaged.
        batch_size: images per batch.
        seed: seed of the noise.

    Raises:
        DataError: there are no images.
        ValueError: `draws` or `batch_size` is less than 1.
    """
    _check(images, draws=draws, batch_size=batch_size)
    right = 0
    for i, (x, labels) in enumerate(_batches(flow, images, batch_size)):
        scores = []
        for label in range(len(prior)):
            # Every class gets the same noise.
            random, candidates = generator(seed, i), torch.full_like(labels, label)
            scores.append(torch.stack([_log_prob(flow, x, candidates, random) for _ in range(draws)]).logsumexp(0))
        scores = torch.stack(scores, dim=1) + prior.log().to(flow.device)
        right += (scores.argmax(1) == labels).sum().item()
    return right / len(images)


@torch.no_grad()
def round_trips(flow: Flow, images: ImageSet, count: int = 64, seed: int = 0) -> dict[str, RoundTrip]:
    """Return the errors of inverse(forward(x)) for images x and of forward(inverse(z)) for noise z.

    Args:
        flow: flow to evaluate.
        images: images to evaluate on.
        count: number of images, taken from the start.
        seed: seed of the noise.

    Raises:
        DataError: there are no images.
        ValueError: `count` is less than 1.
    """
    _check(images, count=count)
    x, labels = next(_batches(flow, images, min(count, len(images))))
    labels = labels if flow.config.num_classes else None
    x = dequantize(x, images.levels, flow.config.noise_std, generator(seed)).to(flow.device, _dtype(flow))
    z = flow.noise(len(x), generator(seed, 1)).to(x.dtype)
    return {
        "inverse_of_forward": _round_trip(flow.inverse(flow(x, labels).z, labels).x, x),
        "forward_of_inverse": _round_trip(flow(flow.inverse(z, labels).x, labels).z, z),
    }


@torch.inference_mode(False)
def logdet_error(flow: Flow, image: torch.Tensor, label: int | None = None, chunk: int = 256) -> float:
    """Return the absolute difference, in nats, between the log-determinant and that of autograd's Jacobian.

    This takes as many backward passes as the image has dimensions.

    Args:
        flow: flow to evaluate.
        image: (C, H, W) floating image.
        label: class of the image, None for none.
        chunk: backward passes per batch.
    """
    dims, rows = image.numel(), []
    for outputs in torch.arange(dims, dtype=torch.int64, device=image.device).split(chunk):
        x = image.expand(len(outputs), *image.shape).clone().requires_grad_()
        labels = None if label is None else torch.full_like(outputs, label)
        output = flow(x, labels)
        picked = output.z.flatten(1).gather(1, outputs.unsqueeze(1)).sum()
        rows.append(torch.autograd.grad(picked, x)[0].flatten(1))
    jacobian = torch.cat(rows).double()
    return abs(torch.linalg.slogdet(jacobian).logabsdet.item() - output.logdet[0].item())


def _check(images: ImageSet, **counts: int) -> None:
    if not len(images):
        raise DataError("images: none to evaluate on")
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}={value}: expected at least 1")


def _dtype(flow: Flow) -> torch.dtype:
    return torch.promote_types(next(flow.parameters()).dtype, torch.float32)


def _batches(flow: Flow, images: ImageSet, batch_size: int):
    for x, labels in batches(images, batch_size=batch_size):
        yield x, labels.to(flow.device)


def _log_prob(flow: Flow, x: torch.Tensor, labels: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    noisy = dequantize(x, flow.config.levels, 0.0, random).to(flow.device, _dtype(flow))
    return flow.log_prob(noisy, labels if flow.config.num_classes else None)


def _round_trip(result: torch.Tensor, expected: torch.Tensor) -> RoundTrip:
    error = (result - expected).abs()
    above = [int((error > limit).sum()) for limit in (FINE, COARSE)]
    return RoundTrip(error.max().item(), error.mean().item(), *above, error.numel())
