"""Train a flow on two moons, compare its density with the true one, and draw it as two_moons.png (20 seconds)."""

import math

import torch
from PIL import Image

from starflow import TokenFlow

NOISE = 0.1


def two_moons(count: int) -> torch.Tensor:
    """Draw points (count, 2) from two half circles with Gaussian noise."""
    angle, lower = math.pi * torch.rand(count), torch.rand(count) < 0.5
    upper_moon = torch.stack([angle.cos(), angle.sin()], 1)
    points = torch.where(lower[:, None], torch.tensor([1.0, 0.5]) - upper_moon, upper_moon)
    return points + NOISE * torch.randn(count, 2)


def true_log_prob(points: torch.Tensor) -> torch.Tensor:
    """Return the log density of points (N, 2), by the mean over many angles."""
    angle = (torch.arange(1000) + 0.5) * math.pi / 1000
    moon = torch.stack([angle.cos(), angle.sin()], 1)
    centers = torch.cat([moon, torch.tensor([1.0, 0.5]) - moon])
    nats = -0.5 * torch.cdist(points, centers).square() / NOISE**2 - math.log(2 * math.pi * NOISE**2)
    return nats.logsumexp(1) - math.log(len(centers))


torch.manual_seed(0)
flow = TokenFlow.preset("vector", features=2, channels=32, layers=(1,) * 8)
flow.standardize(two_moons(10_000))
optimizer = torch.optim.AdamW(flow.parameters(), lr=2e-3)
steps = 600
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, steps)
for _ in range(steps):
    loss = -flow.log_prob(two_moons(512)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()

density = flow.distribution()
with torch.no_grad():
    held_out = two_moons(5000)
    gap = (true_log_prob(held_out) - density.log_prob(held_out)).mean()
    samples = density.sample((5000,))
    off = (true_log_prob(samples) < -5).float().mean()
    print(f"held-out log density: true {true_log_prob(held_out).mean():.3f} nats, flow lower by {gap:.3f}")
    print(f"samples where the true density is below exp(-5): {off:.1%}")
    axis = torch.linspace(-1.5, 2.5, 200)
    grid = torch.cartesian_prod(axis.flip(0) - 0.25, axis).flip(1)
    picture = density.log_prob(grid).exp().reshape(200, 200)
    Image.fromarray((255 * (1 - picture / picture.max())).byte().numpy()).save("two_moons.png")
assert gap < 0.1
