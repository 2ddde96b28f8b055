"""Simulators of simulation-based inference: prior, simulation, and the exact posterior density where it is known.

Two moons and SLCP are those of the benchmark arXiv 2101.04653. Flows work on unbounded values of variance about 1: a
uniform prior becomes a logistic distribution. Densities are compared in these values, in nats.
"""

from __future__ import annotations

import dataclasses
import math

import torch

LOGISTIC_STD = math.pi / math.sqrt(3)


def normal_log_prob(x: torch.Tensor, mean: torch.Tensor | float, std: torch.Tensor | float) -> torch.Tensor:
    """Return the log density of each value."""
    return -0.5 * ((x - mean) / std).square() - torch.as_tensor(std).log() - 0.5 * math.log(2 * math.pi)


@dataclasses.dataclass(frozen=True)
class Uniform:
    """A uniform prior on (-bound, bound) for each parameter."""

    bound: float
    parameters: int

    def prior(self, count: int, random: torch.Generator) -> torch.Tensor:
        """Return unbounded parameters (count, P)."""
        share = torch.rand(count, self.parameters, generator=random, dtype=torch.float64)
        return (share.clamp(1e-6, 1 - 1e-6).logit() / LOGISTIC_STD).float()

    def theta(self, y: torch.Tensor) -> torch.Tensor:
        """Return the parameters of unbounded values."""
        return (2 * (LOGISTIC_STD * y).sigmoid() - 1) * self.bound

    def log_prior(self, y: torch.Tensor) -> torch.Tensor:
        """Return the log density (n,) of unbounded values."""
        scaled = LOGISTIC_STD * y
        log_sigmoid = torch.nn.functional.logsigmoid
        return (log_sigmoid(scaled) + log_sigmoid(-scaled) + math.log(LOGISTIC_STD)).sum(-1)


@dataclasses.dataclass(frozen=True)
class TwoMoons(Uniform):
    """Two parameters whose posterior is a pair of crescents."""

    name: str = "two moons"
    bound: float = 1.0
    parameters: int = 2
    observed: int = 2

    def simulate(self, y: torch.Tensor, random: torch.Generator) -> torch.Tensor:
        """Return an observation (n, 2) per row of unbounded parameters."""
        angle = (torch.rand(len(y), generator=random) - 0.5) * math.pi
        radius = 0.1 + 0.01 * torch.randn(len(y), generator=random)
        return crescent(radius, angle) + shift(self.theta(y))

    def log_posterior(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the exact log density (n,) of unbounded parameters given observations."""
        u, v = (x - shift(self.theta(y)) - x.new_tensor([0.25, 0.0])).double().unbind(-1)
        radius = torch.hypot(u, v)
        likelihood = normal_log_prob(radius, 0.1, 0.01) - (math.pi * radius).log()
        return likelihood.where(u > 0, -torch.inf) + self.log_prior(y) - self.log_evidence(x)

    def log_evidence(self, x: torch.Tensor, angles: int = 400, radii: int = 50) -> torch.Tensor:
        """Return the log density (n,) of observations: the share of the crescent around x with allowed parameters."""
        angle = ((torch.arange(angles) + 0.5) / angles - 0.5) * math.pi
        radius = 0.1 + 0.01 * math.sqrt(2) * torch.erfinv(2 * (torch.arange(radii) + 0.5) / radii - 1)
        points = crescent(radius[:, None], angle[None]).flatten(0, 1)
        shares = []
        for row in x:
            a, b = ((row - points) / math.sqrt(2)).unbind(-1)
            # shift(theta) = row - points has two solutions, theta = (-a - b, -a + b) and (a - b, a + b), if a <= 0.
            inside = ((a - b).abs().maximum((a + b).abs()) <= self.bound) & (a <= 0)
            shares.append(2 * inside.double().mean() / (2 * self.bound) ** 2)
        return torch.stack(shares).log()

    def posterior(self, x: torch.Tensor, count: int, random: torch.Generator) -> torch.Tensor:
        """Return exact posterior samples (count, 2) of the parameters given an observation (2,)."""
        found = torch.empty(0, 2)
        while len(found) < count:
            angle = (torch.rand(count, generator=random) - 0.5) * math.pi
            a, b = (x - crescent(0.1 + 0.01 * torch.randn(count, generator=random), angle)).div(math.sqrt(2)).unbind(-1)
            # See log_evidence for the two solutions.
            a_sign = torch.randint(2, (count,), generator=random) * 2 - 1
            theta = torch.stack([a_sign * a - b, a_sign * a + b], -1)
            found = torch.cat([found, theta[(a <= 0) & (theta.abs() <= self.bound).all(-1)]])
        return found[:count]


def crescent(radius: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Return points (..., 2)."""
    return torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()], -1)


def shift(theta: torch.Tensor) -> torch.Tensor:
    """Return the mean of the center of the crescent (..., 2) for parameters of two moons."""
    a, b = theta.unbind(-1)
    return torch.stack([-(a + b).abs(), b - a], -1) / math.sqrt(2)


@dataclasses.dataclass(frozen=True)
class SLCP(Uniform):
    """Simple likelihood, complex posterior: four draws of a normal distribution in the plane with five parameters."""

    name: str = "SLCP"
    bound: float = 3.0
    parameters: int = 5
    observed: int = 8

    def simulate(self, y: torch.Tensor, random: torch.Generator) -> torch.Tensor:
        """Return an observation (n, 8) per row of unbounded parameters."""
        theta = self.theta(y)[:, None]
        mean, std, rho = theta[..., :2], theta[..., 2:4].square(), theta[..., 4].tanh()
        first, second = torch.randn(2, len(y), 4, generator=random)
        second = rho * first + (1 - rho.square()).sqrt() * second
        return (mean + std * torch.stack([first, second], -1)).flatten(1)

    def log_likelihood(self, theta: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the log density (n,) of an observation (8,) given parameters (n, 5)."""
        theta = theta[:, None].double()
        first, second = ((x.view(4, 2) - theta[..., :2]) / theta[..., 2:4].square()).unbind(-1)
        rho = theta[..., 4].tanh()
        given = normal_log_prob(second, rho * first, (1 - rho.square()).sqrt())
        return (normal_log_prob(first, 0, 1) + given - theta[..., 2:4].square().log().sum(-1)).sum(-1)

    def posterior(self, x: torch.Tensor, count: int, random: torch.Generator) -> torch.Tensor:
        """Return posterior samples (count, 5) given an observation (8,): rounds of importance resampling.

        Each proposal is a sum of Gaussians around the resampled points of the round before, and the prior.
        """
        kernels, draws, prior = 500, 50_000, 0.05
        theta = (2 * torch.rand(40 * draws, 5, generator=random) - 1) * self.bound
        weights = self.log_likelihood(theta, x).nan_to_num(-torch.inf).softmax(0)
        for share in (0.6,) * 5 + (0.4,):
            centers = theta[torch.multinomial(weights, kernels, replacement=True, generator=random)]
            width = share * torch.cat([centers[:, :2], centers[:, 2:4].abs(), centers[:, 4:]], 1).std(0)
            # The posterior is the same for both signs of the third and of the fourth parameter.
            centers[:, 2:4] *= torch.randint(2, (kernels, 2), generator=random) * 2 - 1
            around = torch.randint(kernels, (draws,), generator=random)
            theta = centers[around] + width * torch.randn(draws, 5, generator=random)
            uniform = (2 * torch.rand(draws, 5, generator=random) - 1) * self.bound
            theta = theta.where(torch.rand(draws, 1, generator=random) > prior, uniform)
            density = [
                normal_log_prob(part[:, None], centers, width).sum(-1).logsumexp(1) for part in theta.split(10_000)
            ]
            density = torch.cat(density).double() - math.log(kernels) + math.log(1 - prior)
            density = torch.logaddexp(density, density.new_tensor(math.log(prior) - 5 * math.log(2 * self.bound)))
            inside = (theta.abs() <= self.bound).all(-1)
            weights = self.log_likelihood(theta, x) - density
            weights = weights.where(inside, -torch.inf).nan_to_num(-torch.inf).softmax(0)
        return theta[torch.multinomial(weights, count, replacement=True, generator=random)]


@dataclasses.dataclass(frozen=True)
class GaussianLinear:
    """The mean of a normal distribution with known variance, under a normal prior."""

    name: str = "Gaussian linear"
    parameters: int = 10
    observed: int = 10
    variance: float = 0.1

    def prior(self, count: int, random: torch.Generator) -> torch.Tensor:
        """Return parameters (count, 10)."""
        return math.sqrt(self.variance) * torch.randn(count, self.parameters, generator=random)

    def theta(self, y: torch.Tensor) -> torch.Tensor:
        """Return the parameters, which are unbounded."""
        return y

    def simulate(self, y: torch.Tensor, random: torch.Generator) -> torch.Tensor:
        """Return an observation (n, 10) per row of parameters."""
        return y + math.sqrt(self.variance) * torch.randn(y.shape, generator=random)

    def posterior(self, x: torch.Tensor, count: int, random: torch.Generator) -> torch.Tensor:
        """Return exact posterior samples (count, 10) given an observation (10,)."""
        return x / 2 + math.sqrt(self.variance / 2) * torch.randn(count, self.parameters, generator=random)


@dataclasses.dataclass(frozen=True)
class EightSchools:
    """Eight schools (Rubin, 1981): effects from a normal distribution of unknown mean and width, measured with noise.

    Parameters are mean / 5, log(width / 5) / 0.5 and the eight effects / 8, with standard normal priors of the first
    two.
    """

    name: str = "eight schools"
    parameters: int = 10
    observed: int = 8
    errors: tuple[float, ...] = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)

    def prior(self, count: int, random: torch.Generator) -> torch.Tensor:
        """Return unbounded parameters (count, 10)."""
        mean, width, *effects = torch.randn(self.parameters, count, generator=random)
        effects = 5 * mean + self.width(width) * torch.stack(effects)
        return torch.cat([mean[None], width[None], effects / 8]).T

    def width(self, value: torch.Tensor) -> torch.Tensor:
        """Return the width of the distribution of effects for its unbounded value."""
        return 5 * (0.5 * value).exp()

    def simulate(self, y: torch.Tensor, random: torch.Generator) -> torch.Tensor:
        """Return an observation (n, 8) per row of parameters."""
        return 8 * y[:, 2:] + y.new_tensor(self.errors) * torch.randn(len(y), 8, generator=random)

    def log_posterior(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the exact log density (n,) of parameters given observations."""
        y, x = y.double(), x.double()
        prior = normal_log_prob(y[:, :2], 0, 1).sum(-1)
        prior += normal_log_prob(y[:, 2:], 5 * y[:, :1] / 8, self.width(y[:, 1:2]) / 8).sum(-1)
        likelihood = normal_log_prob(x, 8 * y[:, 2:], x.new_tensor(self.errors)).sum(-1)
        return prior + likelihood - self.log_evidence(x)

    def log_evidence(self, x: torch.Tensor, points: int = 400) -> torch.Tensor:
        """Return the log density (n,) of observations, which are normal given the width, by quadrature over it."""
        value = torch.linspace(-8, 8, points, dtype=x.dtype)
        covariance = 25 + torch.diag_embed(self.width(value)[:, None].square() + x.new_tensor(self.errors).square())
        given = torch.distributions.MultivariateNormal(x.new_zeros(8), covariance).log_prob(x[:, None])
        return (given + normal_log_prob(value, 0, 1) + math.log(16 / (points - 1))).logsumexp(-1)
