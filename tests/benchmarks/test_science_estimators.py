"""Effective sample sizes, free energies and ranks of the benchmarks, where the answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.science.estimators import (
    bridge_log_z,
    effective_sample_size,
    log_z,
    ranks,
    uniformity,
    with_error,
)

F64 = torch.float64
WIDTH = 0.6
EXACT = math.log(WIDTH * math.sqrt(2 * math.pi))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian_weights(count=50_000):
    """Log weights of a standard normal flow for the energy x^2 / (2 WIDTH^2), at samples of the flow and the system."""
    own, system = torch.randn(2, count, generator=generator(), dtype=F64)
    density = torch.distributions.Normal(torch.zeros((), dtype=F64), 1.0)
    return tuple(-x.square() / (2 * WIDTH**2) - density.log_prob(x) for x in (own, WIDTH * system))


def test_effective_sample_size_is_its_formula():
    weights = torch.tensor([0.5, 2.0, 3.0, 0.1], dtype=F64)
    expected = weights.sum().square() / weights.square().sum() / 4
    assert effective_sample_size(weights.log() + 300) == pytest.approx(expected.item())


def test_effective_sample_size_is_between_one_sample_and_all():
    assert effective_sample_size(torch.zeros(10, dtype=F64)) == pytest.approx(1)
    one = torch.full((10,), -torch.inf, dtype=F64)
    one[3] = 5.0
    assert effective_sample_size(one) == pytest.approx(0.1)


def test_effective_sample_size_of_a_gaussian():
    """For w = exp(-x^2 / (2 s^2)) / N(x), (mean w)^2 / mean w^2 = s sqrt(2 - s^2)... by two Gaussian integrals."""
    own, _ = gaussian_weights()
    square = WIDTH / math.sqrt(2 - WIDTH**2) * 2 * math.pi  # mean of w^2
    assert effective_sample_size(own) == pytest.approx(math.exp(2 * EXACT) / square, abs=0.01)


@pytest.mark.parametrize("estimate, own_only", [(log_z, True), (bridge_log_z, False)], ids=["importance", "bridge"])
def test_log_partition_function_of_a_gaussian(estimate, own_only):
    samples = gaussian_weights()[: 1 if own_only else 2]
    value, error = with_error(estimate, *samples)
    assert error < 0.01
    assert value == pytest.approx(EXACT, abs=4 * error)


def test_bridge_needs_less_than_importance_sampling():
    """With samples of both, the overlap of a narrow flow and a wide system suffices."""
    own, system = gaussian_weights()
    assert with_error(bridge_log_z, own, system)[1] < with_error(log_z, own)[1]


def test_error_of_a_mean():
    samples = torch.randn(100_000, generator=generator(), dtype=F64)
    value, error = with_error(lambda x: x.mean().item(), samples)
    assert value == samples.mean().item()
    assert error == pytest.approx(100_000**-0.5, rel=0.7)


def conjugate(draws, tests=2000, width=1.0, shift=0.0):
    """P value of ranks for x ~ N(theta, 1), theta ~ N(0, 1): the posterior is N(x / 2, 1 / 2), here made wrong."""
    theta, noise = torch.randn(2, tests, 1, generator=generator(1), dtype=F64)
    mean, std = (theta + noise) / 2 + shift, math.sqrt(0.5) * width
    samples = mean[:, None] + std * torch.randn(tests, draws, 1, generator=generator(2), dtype=F64)
    return uniformity(ranks(theta, samples), draws).item()


def test_ranks_of_an_exact_posterior_are_uniform():
    assert conjugate(99) > 0.01


@pytest.mark.parametrize("wrong", [{"width": 0.7}, {"width": 1.4}, {"shift": 0.2}], ids=str)
def test_ranks_of_a_wrong_posterior_are_not_uniform(wrong):
    assert conjugate(99, **wrong) < 1e-6


def test_p_value_of_known_counts():
    """Two bins of 60 and 40: chi-square 4 with one degree of freedom, whose p value is erfc(sqrt(2))."""
    found = torch.cat([torch.zeros(60), torch.ones(40)]).long()[:, None]
    assert uniformity(found, 1, bins=2).item() == pytest.approx(math.erfc(math.sqrt(2)))


def test_ranks_count_smaller_samples():
    samples = torch.tensor([[[1.0, 5.0], [2.0, 6.0], [3.0, 7.0]]])
    assert ranks(torch.tensor([[2.5, 4.0]]), samples).tolist() == [[2, 0]]
