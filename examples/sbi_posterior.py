"""Train a TarFlow as density estimator of sbi, and compare its posterior with the exact one, which is two moons.

    pip install "starflow-kernels[adapters]"

Takes 15 seconds.
"""

import math

import torch
from sbi.inference import NPE
from sbi.utils import BoxUniform
from sbi.utils.metrics import c2st

from starflow import TokenFlow
from starflow_kernels.adapters.sbi import tarflow_builder


def crescent(count: int) -> torch.Tensor:
    """Draw points (count, 2) on a noisy half circle."""
    angle, radius = math.pi * (torch.rand(count) - 0.5), 0.1 + 0.01 * torch.randn(count)
    return torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()], 1)


def simulate(theta: torch.Tensor) -> torch.Tensor:
    """Return observations (N, 2) for parameters (N, 2)."""
    moved = torch.stack([-theta.sum(1).abs(), theta[:, 1] - theta[:, 0]], 1)
    return crescent(len(theta)) + moved / math.sqrt(2)


def exact_posterior(count: int) -> torch.Tensor:
    """Draw parameters (count, 2) of which the observation is 0: each point of the crescent has two of them."""
    p = crescent(count)
    total = p[:, 0] * math.sqrt(2) * (2 * torch.randint(2, (count,)) - 1)
    difference = -p[:, 1] * math.sqrt(2)
    return torch.stack([total - difference, total + difference], 1) / 2


def make_flow(features: int, context: int) -> TokenFlow:
    """Return a small flow on vectors under a condition."""
    size = {"channels": 32, "layers": (1,) * 4, "head_dim": 16}
    return TokenFlow.preset("vector", features=features, condition="vector", condition_dim=context, **size)


torch.manual_seed(0)
prior = BoxUniform(-torch.ones(2), torch.ones(2))
theta = prior.sample((4000,))
inference = NPE(prior, density_estimator=tarflow_builder(make_flow), show_progress_bars=False)
inference.append_simulations(theta, simulate(theta))
inference.train(training_batch_size=200, learning_rate=1e-3, max_num_epochs=40)
posterior = inference.build_posterior()

samples = posterior.sample((1000,), x=torch.zeros(1, 2), show_progress_bars=False)
accuracy = c2st(samples, exact_posterior(1000)).item()
print(f"a classifier tells exact samples from those of the flow in {accuracy:.0%} of cases (50 % is perfect)")
assert accuracy < 0.85
