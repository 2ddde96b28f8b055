"""Posteriors of simulators: a TokenFlow beside flows of zuko after the same CPU time, with calibration.

    pip install 'starflow-kernels[adapters]'
    python -m benchmarks.science.posteriors --json benchmarks/results/posteriors_cpu.json

Every flow gets the same simulations and the same CPU time of one thread, and keeps the parameters that were best on
held-out simulations. CPU time, unlike wall time, does not depend on what else runs on the machine. Test simulations are
new to all flows. Calibration: if the posterior is right, the rank of the true parameter among posterior samples is
uniform (arXiv 1804.06788), and so is that of the density of the true parameters among those of the samples.
"""

from __future__ import annotations

import argparse
import json
import math

import torch
import zuko
from torch import nn

from ..command import benchmark
from .estimators import ranks, uniformity
from .flows import Peer, fit, token_flow
from .simulators import SLCP, EightSchools, TwoMoons

SIMULATORS = {"two moons": TwoMoons(), "SLCP": SLCP(), "eight schools": EightSchools()}
BATCH = 256
FLOWS = "TokenFlow", "NSF", "MAF"
RATE = 2e-3


def build(kind: str, simulator, **settings) -> nn.Module:
    """Return an untrained flow; a TokenFlow takes settings."""
    if kind == "TokenFlow":
        return token_flow(simulator.parameters, simulator.observed, **settings)
    return Peer(kind, simulator.parameters, simulator.observed, transforms=5)


class Simulations:
    """Pairs of unbounded parameters and standardized observations."""

    def __init__(self, simulator, count: int, seed: int, scale: tuple[torch.Tensor, torch.Tensor] | None = None):
        random = torch.Generator().manual_seed(seed)
        self.y = simulator.prior(count, random)
        self.x = simulator.simulate(self.y, random)
        self.scale = scale or (self.x.mean(0), self.x.std(0))
        self.condition = (self.x - self.scale[0]) / self.scale[1]

    def batch(self, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.randint(len(self.y), (BATCH,), generator=random)
        return self.y[rows], self.condition[rows]


def train(kind: str, simulator, data: Simulations, seconds: float, seed: int = 0, **settings) -> tuple[nn.Module, int]:
    """Return a flow that is trained by likelihood for a CPU time, and the number of steps."""
    torch.manual_seed(seed)
    flow, random = build(kind, simulator, **settings), torch.Generator().manual_seed(seed)
    held_out = Simulations(simulator, 2000, 1, data.scale)

    def loss() -> torch.Tensor:
        return -flow.log_prob(*data.batch(random)).mean()

    return flow, fit(flow, loss, seconds, RATE, lambda: -flow.log_prob(held_out.y, held_out.condition).mean().item())


def calibration(flow: nn.Module, test: Simulations, draws: int) -> dict[str, float]:
    """Return the p values of the ranks of each parameter and of the density."""
    condition = test.condition.repeat_interleave(draws, 0)
    samples = flow.sample(len(condition), condition, seed=3)
    with torch.no_grad():
        parts = zip(samples.split(10_000), condition.split(10_000))
        density = torch.cat([flow.log_prob(*part) for part in parts])
        truth = torch.cat([test.y, flow.log_prob(test.y, test.condition)[:, None]], 1)
    found = torch.cat([samples, density[:, None]], 1).unflatten(0, (-1, draws))
    values = uniformity(ranks(truth, found), draws)
    names = [*(f"parameter {i + 1}" for i in range(test.y.shape[1])), "density"]
    return dict(zip(names, values.tolist()))


def rows(simulator, kinds: list[str], simulations: int, tests: int, draws: int, seconds: float) -> list[dict]:
    """Return the rows of one simulator."""
    data = Simulations(simulator, simulations, 0)
    test = Simulations(simulator, tests, 2, data.scale)

    def row(name: str, log_prob: torch.Tensor, **more) -> dict:
        nats = {"nats": log_prob.mean().item(), "error": log_prob.std().item() / math.sqrt(tests)}
        return {"case": f"{simulator.name}, {name}", **nats, **more}

    found = []
    exact = None
    if hasattr(simulator, "log_posterior"):
        exact = simulator.log_posterior(test.y, test.x)
        found.append(row("exact posterior", exact))
    for kind in kinds:
        flow, steps = train(kind, simulator, data, seconds)
        with torch.no_grad():
            log_prob = flow.log_prob(test.y, test.condition)
        count = sum(p.numel() for p in flow.parameters())
        more = {"steps": steps, "parameters": count, "p_values": calibration(flow, test, draws)}
        if exact is not None:
            gap = exact - log_prob
            more |= {"below_exact": gap.mean().item(), "error_below_exact": gap.std().item() / math.sqrt(tests)}
        found.append(row(kind, log_prob, **more))
        print(json.dumps(found[-1]), flush=True)
    return found


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--simulators", nargs="+", choices=SIMULATORS, default=["two moons", "SLCP"])
    parser.add_argument("--flows", nargs="+", choices=FLOWS, default=FLOWS)
    parser.add_argument("--simulations", type=int, default=20_000, help="simulations to train on")
    parser.add_argument("--tests", type=int, default=2000, help="simulations to test with")
    parser.add_argument("--draws", type=int, default=99, help="posterior samples per test simulation")
    parser.add_argument("--seconds", type=float, default=240, help="CPU time of the training of each flow")


def results(args: argparse.Namespace) -> dict:
    sizes = args.flows, args.simulations, args.tests, args.draws, args.seconds
    table = [row for name in args.simulators for row in rows(SIMULATORS[name], *sizes)]
    settings = {name: getattr(args, name) for name in ("simulations", "tests", "draws", "seconds")}
    return {"machine": {"zuko": zuko.__version__}, "settings": settings, "rows": table}


main = benchmark(__doc__, results, options, threads=1)


if __name__ == "__main__":
    main()
