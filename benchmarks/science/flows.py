"""The flows that are compared, with the methods of TokenFlow, and their training for a given CPU time."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable

import torch
import zuko
from torch import nn

from starflow import TokenFlow


def token_flow(features: int, condition: int = 0, **settings) -> TokenFlow:
    """Return a TokenFlow on vectors with the settings of the preset, or others."""
    condition = {"condition": "vector", "condition_dim": condition} if condition else {}
    return TokenFlow.preset("vector", features=features, **condition, **settings)


class Peer(nn.Module):
    """A flow of zuko, with the methods of TokenFlow.

    Args:
        kind: class of zuko.flows.
        features: values per sample.
        condition: values of the condition, 0 for none.
        options: further arguments of the class.
    """

    def __init__(self, kind: str, features: int, condition: int = 0, **options):
        super().__init__()
        self.flow = getattr(zuko.flows, kind)(features, condition, **options)

    def log_prob(self, x: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        return self.flow(condition).log_prob(x)

    def sample(self, count: int, condition: torch.Tensor | None = None, *, seed: int = 0) -> torch.Tensor:
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.rsample(count, condition)[0]

    def rsample(self, count: int, condition: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        return self.flow(condition).rsample_and_log_prob((count,) if condition is None else ())


def fit(
    flow: nn.Module,
    loss: Callable[[], torch.Tensor],
    seconds: float,
    rate: float,
    validate: Callable[[], float] | None = None,
    checks: int = 25,
) -> int:
    """Minimize a random loss by Adam for a given CPU time, and return the number of steps.

    Args:
        flow: the flow, whose parameters change.
        loss: returns the loss of a fresh batch.
        seconds: CPU time of this process, which other processes on the machine do not change.
        rate: learning rate, which falls to zero by a cosine.
        validate: returns the loss of held-out data, `checks` times, in time that does not count; the best parameters
            are kept. None keeps the last ones.
    """
    optimizer = torch.optim.Adam(flow.parameters(), lr=rate)
    used, steps, best, checked = 0.0, 0, (math.inf, None), 0
    while used < seconds:
        start = time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (steps + 1) / 50) * (1 + math.cos(math.pi * used / seconds)) / 2
        value = loss()
        optimizer.zero_grad()
        value.backward()
        norm = nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
        if norm.isfinite():
            optimizer.step()
        steps += 1
        used += time.process_time() - start
        if validate and used >= seconds * (checked + 1) / checks:
            checked += 1
            with torch.no_grad():
                held_out = validate()
            if held_out < best[0]:
                best = held_out, copy.deepcopy(flow.state_dict())
    if best[1]:
        flow.load_state_dict(best[1])
    return steps
