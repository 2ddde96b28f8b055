"""Simulators of the benchmarks: draws have the stated distribution, and exact posteriors are densities of it."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.science.simulators import SLCP, EightSchools, GaussianLinear, TwoMoons, normal_log_prob

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("simulator", [TwoMoons(), SLCP()], ids=["two-moons", "slcp"])
def test_prior_is_uniform_and_of_variance_one(simulator):
    y = simulator.prior(20_000, generator())
    share = (simulator.theta(y) / simulator.bound + 1) / 2
    sorted_share = share.sort(0).values
    steps = torch.linspace(0, 1, 20_000)[:, None]
    assert (sorted_share - steps).abs().max() < 1.9 / math.sqrt(20_000)  # Kolmogorov-Smirnov, p = 0.1 % per parameter
    assert y.std() == pytest.approx(1, abs=0.02)


def test_density_of_the_prior_integrates_to_one():
    axis = torch.linspace(-12, 12, 4001, dtype=F64)[:, None]
    assert TwoMoons().log_prior(axis).exp().sum() * 24 / 4000 == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("row", range(3))
def test_posterior_of_two_moons_integrates_to_one(row):
    simulator, random = TwoMoons(), generator(row)
    x = simulator.simulate(simulator.prior(1, random), random)
    axis = torch.linspace(-6, 6, 2401)
    grid = torch.cartesian_prod(axis, axis)
    total = simulator.log_posterior(grid, x).exp().sum() * (12 / 2400) ** 2
    assert total == pytest.approx(1, abs=0.02)


def test_two_moons_are_crescents_around_two_solutions():
    simulator, random = TwoMoons(), generator()
    y = simulator.prior(5000, random)
    x, theta = simulator.simulate(y, random), simulator.theta(y)
    a, b = theta.unbind(1)
    point = x - torch.stack([-(a + b).abs(), b - a], 1) / math.sqrt(2)
    radius = (point - torch.tensor([0.25, 0.0])).norm(dim=1)
    assert (point[:, 0] > 0.25).all()
    assert radius.mean() == pytest.approx(0.1, abs=1e-3) and radius.std() == pytest.approx(0.01, abs=1e-3)
    y, x = y[:20].double(), x[:20].double()
    torch.testing.assert_close(simulator.log_posterior(-y.flip(1), x), simulator.log_posterior(y, x))


def test_slcp_draws_have_its_moments():
    simulator, count = SLCP(), 40_000
    theta = torch.tensor([0.7, -2.9, -1.0, 1.5, 0.6])
    y = ((theta / 3 + 1) / 2).logit() / (math.pi / math.sqrt(3))
    x = simulator.simulate(y.expand(count, -1), generator()).unflatten(1, (4, 2)).flatten(0, 1)
    torch.testing.assert_close(x.mean(0), theta[:2], rtol=0, atol=0.03)
    rho = math.tanh(0.6)
    expected = torch.tensor([[1.0, 2.25 * rho], [2.25 * rho, 2.25**2]])
    torch.testing.assert_close(x.T.cov(), expected, rtol=0, atol=0.06)


def test_evidence_of_eight_schools_is_the_mean_likelihood():
    simulator, random = EightSchools(), generator()
    x = simulator.simulate(simulator.prior(2, random), random).double()
    y = simulator.prior(200_000, random).double()
    for row in x:
        likelihood = normal_log_prob(row, 8 * y[:, 2:], row.new_tensor(simulator.errors)).sum(1)
        mean = likelihood.logsumexp(0) - math.log(len(y))
        assert simulator.log_evidence(row[None]).item() == pytest.approx(mean.item(), abs=0.05)


def test_posterior_of_eight_schools_is_likelihood_times_prior():
    """Ratios of two densities, in which the evidence drops out, equal those of the written-out model."""
    simulator, random = EightSchools(), generator()
    x = simulator.simulate(simulator.prior(1, random), random).double()
    y = simulator.prior(2, random).double()

    def joint(row):
        mean, width = 5 * row[0], 5 * math.exp(row[1] / 2)
        total = -(row[0] ** 2 + row[1] ** 2) / 2
        for effect, value, error in zip(row[2:], x[0].tolist(), simulator.errors):
            total -= ((8 * effect - mean) / width) ** 2 / 2 + math.log(width) + ((value - 8 * effect) / error) ** 2 / 2
        return total

    found = simulator.log_posterior(y, x.expand(2, -1))
    first, second = (joint(row) for row in y.tolist())
    assert (found[0] - found[1]).item() == pytest.approx(first - second)


def test_posterior_samples_of_two_moons_have_its_density():
    simulator, random = TwoMoons(), generator(1)
    x = simulator.simulate(simulator.prior(1, random), random)
    theta = simulator.posterior(x[0], 4000, random)
    axis = torch.linspace(-6, 6, 1201)
    grid = torch.cartesian_prod(axis, axis)
    weights = simulator.log_posterior(grid, x).softmax(0)
    for moment in (lambda t: t, torch.square, torch.abs):
        values = moment(simulator.theta(grid)).double()
        mean = (weights[:, None] * values).sum(0)
        error = ((weights[:, None] * values.square()).sum(0) - mean.square()).sqrt() / math.sqrt(len(theta))
        assert ((moment(theta).mean(0) - mean).abs() < 4 * error + 0.003).all()


def test_likelihood_of_slcp_is_that_of_four_draws_in_the_plane():
    theta, x = torch.tensor([[0.7, -2.9, -1.0, 1.5, 0.6]]).double(), torch.randn(8, generator=generator()).double()
    rho = math.tanh(0.6)
    covariance = torch.tensor([[1.0, 2.25 * rho], [2.25 * rho, 2.25**2]], dtype=F64)
    expected = torch.distributions.MultivariateNormal(theta[0, :2], covariance).log_prob(x.view(4, 2)).sum()
    torch.testing.assert_close(SLCP().log_likelihood(theta, x)[0], expected)


def test_posterior_of_gaussian_linear_has_half_of_the_variance():
    simulator, random = GaussianLinear(), generator()
    y = simulator.prior(100_000, random)
    x = simulator.simulate(y, random)
    # Of all pairs, y - x / 2 is what the posterior says it is, and does not depend on x.
    expected = simulator.posterior(torch.zeros(10), 100_000, random)
    torch.testing.assert_close((y - x / 2).T.cov(), expected.T.cov(), rtol=0, atol=2e-3)
    assert ((y - x / 2).T @ x / len(x)).abs().max() < 3e-3
