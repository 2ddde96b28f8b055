"""Train a TarFlow and a neural spline flow by the same code of zuko, on a distribution that depends on a context.

    pip install "starflow-kernels[adapters]"

Takes 8 seconds.
"""

import time

import torch
import zuko

from starflow import TokenFlow
from starflow_kernels.adapters.zuko import TarFlow


def draw(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw points (count, 4) on a bent curve, and the context (count, 2) that bends it."""
    context = torch.randn(count, 2)
    x = torch.randn(count, 4)
    for i in range(1, 4):
        x[:, i] = 0.3 * x[:, i] + torch.sin(x[:, i - 1] + context[:, i % 2])
    return x, context


def train(flow: zuko.lazy.Flow, steps: int = 300) -> None:
    """Fit a flow of zuko by maximum likelihood."""
    optimizer = torch.optim.Adam(flow.parameters(), lr=2e-3)
    for _ in range(steps):
        x, context = draw(256)
        loss = -flow(context).log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


torch.manual_seed(0)
tokens = TokenFlow.preset("vector", features=4, channels=32, layers=(1, 1, 1), condition="vector", condition_dim=2)
x, context = draw(5000)
for name, flow in {"TarFlow": TarFlow(tokens), "NSF": zuko.flows.NSF(4, context=2, transforms=3)}.items():
    train(flow)
    with torch.no_grad():
        nats = flow(context).log_prob(x).mean()
        start = time.perf_counter()
        samples, log_prob = flow(context[:10]).rsample_and_log_prob((1000,))  # (1000, 10, 4), (1000, 10)
        seconds = time.perf_counter() - start
        error = (flow(context[:10]).log_prob(samples) - log_prob).abs().max()
    print(f"{name}: held-out log density {nats:.3f} nats, 10 000 samples in {seconds:.2f} s, error of both {error:.0e}")
    assert nats > -2.5 and error < 1e-3
