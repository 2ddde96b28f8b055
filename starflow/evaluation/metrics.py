"""Evaluation: likelihood, classification by Bayes' rule, and the exactness of a flow."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch

from ..data.batches import batches
from ..data.datasets import ImageSet, dequantize
from ..errors import DataError
from ..models.flow import Flow
from ..sampling.processes import Processes
from ..seeds import generator

COARSE = 1e-2
FINE = 1e-3


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Upper bound on the bits per dimension of integer images, averaged over the images.

    Args:
        bits_per_dim: mean bits per dimension.
        standard_error: standard error of that mean over the images; None for a single image.
        images: number of images.
        draws: draws of the dequantization noise per image.
    """

    bits_per_dim: float
    standard_error: float | None
    images: int
    draws: int


@dataclasses.dataclass(frozen=True)
class Scores:
    """Log densities of dequantized images.

    Args:
        log_probs: (N, draws) float64, in nats, under the class of each image.
        correct: (N,) bool, whether the class of an image maximizes p(x | y) p(y); None if no prior was given.
        dims: values per image.
        levels: gray levels.
    """

    log_probs: torch.Tensor
    correct: torch.Tensor | None
    dims: int
    levels: int

    def uniform(self) -> Likelihood:
        """Return the bound of uniform dequantization, the mean of -log2 p(x + u) (arXiv 2412.06329, section 3.1)."""
        return self._bound(self.log_probs.mean(1))

    def importance_weighted(self) -> Likelihood:
        """Return the bound -log2 mean_k p(x + u_k), which is tighter the more draws there are."""
        return self._bound(self.log_probs.logsumexp(1) - math.log(self.log_probs.shape[1]))

    def accuracy(self) -> float:
        """Return the fraction of images that are classified correctly.

        Raises:
            ValueError: no prior was given.
        """
        if self.correct is None:
            raise ValueError("prior: the images were scored without one, under their own class alone")
        return self.correct.double().mean().item()

    def _bound(self, nats: torch.Tensor) -> Likelihood:
        bits = -nats / self.dims / math.log(2) + math.log2(self.levels / 2)
        error = bits.std().item() / math.sqrt(len(bits)) if len(bits) > 1 else None
        return Likelihood(bits.mean().item(), error, *self.log_probs.shape)


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
def score(
    flow: Flow,
    images: ImageSet,
    draws: int = 8,
    batch_size: int = 256,
    seed: int = 0,
    prior: torch.Tensor | None = None,
) -> Scores:
    """Return log densities of images with draws of uniform dequantization noise.

    The noise of an image is determined by the seed and the index of the image. Under torchrun every process calls this
    function and scores its part of the batches. All of them get all scores, the same for any number of processes.

    Args:
        flow: flow to evaluate; a class-conditional one gets the class of each image.
        images: images to evaluate on.
        draws: draws of the noise per image.
        batch_size: images per batch.
        seed: seed of the noise.
        prior: (num_classes,) probabilities p(y) of the classes, to classify the images by Bayes' rule as well.

    Raises:
        DataError: there are no images.
        ValueError: `draws` or `batch_size` is less than 1.
    """
    _check(images, draws=draws, batch_size=batch_size)
    rows = torch.arange(len(images), dtype=torch.int64, device="cpu").split(batch_size)
    processes = Processes()
    own = rows[processes.rank :: processes.count]
    found = [
        _score_batch(flow, *batch, [generator(seed, i) for i in part.tolist()], draws, prior)
        for part, batch in zip(own, _batches(flow, images, batch_sampler=[part.tolist() for part in own]))
    ]
    gathered = processes.gather(found)
    # Batches were dealt out in turn.
    ordered = [gathered[i % processes.count][i // processes.count] for i in range(len(rows))]
    log_probs = torch.cat([log_prob for log_prob, _ in ordered])
    correct = None if prior is None else torch.cat([part for _, part in ordered])
    return Scores(log_probs, correct, images[0][0].numel(), images.levels)


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
    x, labels = next(_batches(flow, images, batch_size=min(count, len(images))))
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


def _batches(flow: Flow, images: ImageSet, **options: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for x, labels in batches(images, **options):
        yield x, labels.to(flow.device)


def _score_batch(
    flow: Flow,
    x: torch.Tensor,
    labels: torch.Tensor,
    random: list[torch.Generator],
    draws: int,
    prior: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the (B, draws) log densities of a batch, and with a prior which images are classified correctly."""
    candidates = [labels] if prior is None else [torch.full_like(labels, label) for label in range(len(prior))]
    found = []
    for _ in range(draws):
        noisy = torch.stack([dequantize(image, flow.config.levels, 0.0, each) for image, each in zip(x, random)])
        noisy = noisy.to(flow.device, _dtype(flow))
        # Every class gets the same noise.
        scores = [flow.log_prob(noisy, each if flow.config.num_classes else None) for each in candidates]
        found.append(torch.stack(scores, dim=1).double().cpu())
    # (B, classes, draws)
    log_probs, labels = torch.stack(found, dim=2), labels.cpu()
    if prior is None:
        return log_probs[:, 0], None
    predicted = (log_probs.logsumexp(2) + prior.double().log()).argmax(1)
    return log_probs[torch.arange(len(x), dtype=torch.int64, device="cpu"), labels], predicted == labels


def _round_trip(result: torch.Tensor, expected: torch.Tensor) -> RoundTrip:
    error = (result - expected).abs()
    above = [int((error > limit).sum()) for limit in (FINE, COARSE)]
    return RoundTrip(error.max().item(), error.mean().item(), *above, error.numel())
