"""Importance sampling and calibration: effective sample size, free energy, and ranks."""

from __future__ import annotations

import math

import torch

from .reference import mbar

GROUPS = 10


def effective_sample_size(log_weights: torch.Tensor) -> float:
    """Return (sum w)^2 / (n sum w^2), between 1 / n and 1."""
    n = len(log_weights)
    return (2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp().item() / n


def with_error(estimate, *samples: torch.Tensor) -> tuple[float, float]:
    """Return an estimate of all samples, and its standard error from estimates of GROUPS groups of them."""
    groups = torch.tensor([estimate(*parts) for parts in zip(*(s.chunk(GROUPS, -1) for s in samples))])
    return estimate(*samples), groups.std().item() / GROUPS**0.5


def log_z(log_weights: torch.Tensor) -> float:
    """Return the log partition function, log mean w, of weights exp(-energy) / density of samples of the density."""
    return log_weights.logsumexp(0).item() - math.log(len(log_weights))


def bridge_log_z(own: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the log partition function by Bennett's acceptance ratio.

    Args:
        own: (n,) log weights of samples of the flow.
        reference: (n,) log weights of samples of the system.
    """
    n = min(len(own), len(reference))
    weights = torch.stack([own[:n], reference[:n]]).double()
    # The states are the flow, in whose units energies are counted, and the system.
    return -mbar(torch.stack([torch.zeros_like(weights), -weights]))[1].item()


def ranks(truth: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """Return how many of L samples (n, L, P) are below the true values (n, P)."""
    return (samples < truth[:, None]).sum(1)


def uniformity(found: torch.Tensor, draws: int, bins: int = 20) -> torch.Tensor:
    """Return the p value (P,) of a chi-square test that ranks (n, P) among `draws` samples are uniform.

    The number of possible ranks, draws + 1, must be a multiple of `bins`.
    """
    n = len(found)
    counts = torch.nn.functional.one_hot(found * bins // (draws + 1), bins).sum(0).double()
    statistic = ((counts - n / bins).square() / (n / bins)).sum(-1)
    freedom = torch.tensor((bins - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(freedom, statistic / 2)
