"""Train a Boltzmann generator of four coupled particles in double wells, and correct its free energy (20 seconds).

The flow learns samples of a simulation, and then also the energy itself: gradients run through its inverse. Weights
exp(-energy) / density correct what the flow got wrong.
"""

import math

import torch

from starflow import TokenFlow

PARTICLES = 4


def well(x: torch.Tensor) -> torch.Tensor:
    """Return the energy of each particle in its well, in kT."""
    return 2 * (x.square() - 1).square()


def energy(x: torch.Tensor) -> torch.Tensor:
    """Return the energy (N,) of particles (N, PARTICLES) with springs between neighbors."""
    return well(x).sum(1) + x.diff(dim=1).square().sum(1) / 2


def simulate(chains: int, steps: int) -> torch.Tensor:
    """Return positions (chains, PARTICLES) after steps of the Metropolis algorithm."""
    x = torch.randn(chains, PARTICLES)
    for step in range(steps):
        # Every fourth proposal is the mirror image of one particle, for jumps between wells.
        i = torch.randint(PARTICLES, (chains, 1))
        moved = x.scatter(1, i, -x.gather(1, i)) if step % 4 == 0 else x + 0.3 * torch.randn_like(x)
        accepted = torch.rand(chains) < (energy(x) - energy(moved)).exp()
        x = torch.where(accepted[:, None], moved, x)
    return x


def exact_free_energy() -> float:
    """Return -log of the integral of exp(-energy), by quadrature over one particle after the other."""
    axis = torch.linspace(-4, 4, 400, dtype=torch.float64)
    single = torch.exp(-well(axis)) * 8 / 399
    spring = torch.exp(-(axis[:, None] - axis).square() / 2)
    total = single
    for _ in range(PARTICLES - 1):
        total = single * (spring @ total)
    return -total.sum().log().item()


torch.manual_seed(0)
data = simulate(20_000, 400)
flow = TokenFlow.preset("vector", features=PARTICLES, channels=32, layers=(1,) * 4)
optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.02, 800)
for step in range(800):
    loss = -flow.log_prob(data[torch.randint(len(data), (256,))]).mean()
    if step >= 700:
        x, log_prob = flow.rsample(256)
        loss = loss + (log_prob + energy(x)).mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
    optimizer.step()
    schedule.step()

with torch.no_grad():
    x, log_prob = flow.rsample(20_000)
log_weights = -energy(x) - log_prob
free_energy = math.log(len(x)) - log_weights.logsumexp(0).item()
ess = (2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp().item() / len(x)
print(f"free energy {free_energy:.3f} kT, exact {exact_free_energy():.3f} kT; effective sample size {ess:.0%}")
assert abs(free_energy - exact_free_energy()) < 0.05
assert ess > 0.35
