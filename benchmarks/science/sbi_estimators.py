"""Density estimators of sbi: a TokenFlow by `tarflow_builder` beside sbi's own zuko_nsf and maf, by sbi's C2ST.

    pip install 'starflow-kernels[adapters]'
    python -m benchmarks.science.sbi_estimators --json benchmarks/results/sbi_estimators_cpu.json

All estimators get the same simulations and the same CPU time of one thread, and keep the parameters that were best on
held-out simulations. They sample as sbi's posterior does, which rejects what is outside of the prior. C2ST is the
accuracy of a classifier between samples and reference samples of a posterior: 0.5 is best, and 1 means that they are
told apart every time. "reference" is a second reference sample. Defaults of sbi 0.27 are used throughout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import sbi
import torch
from sbi.inference import NPE
from sbi.neural_nets import posterior_nn
from sbi.utils import BoxUniform
from sbi.utils.metrics import c2st
from torch.distributions import MultivariateNormal

from starflow_kernels.adapters.sbi import tarflow_builder

from ..command import benchmark
from .flows import fit, token_flow
from .simulators import SLCP, GaussianLinear, TwoMoons

SIMULATORS = {"two moons": TwoMoons(), "SLCP": SLCP(), "Gaussian linear": GaussianLinear()}
BUILDERS = {
    "TokenFlow": lambda: tarflow_builder(token_flow),
    "zuko_nsf": lambda: posterior_nn("zuko_nsf"),
    "maf": lambda: posterior_nn("maf"),
}
BATCH, HELD_OUT, RATE = 256, 1000, 2e-3


def prior(simulator):
    """Return the prior of the parameters as a distribution of sbi."""
    if isinstance(simulator, GaussianLinear):
        return MultivariateNormal(torch.zeros(10), simulator.variance * torch.eye(10))
    bound = torch.full((simulator.parameters,), simulator.bound)
    return BoxUniform(-bound, bound)


def simulate(simulator, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return parameters and observations."""
    random = torch.Generator().manual_seed(seed)
    y = simulator.prior(count, random)
    return simulator.theta(y), simulator.simulate(y, random)


def estimate(kind: str, simulator, simulations: int, seconds: float):
    """Return a posterior of sbi, and the number of steps."""
    torch.manual_seed(0)
    theta, x = simulate(simulator, simulations, 0)
    held_out = simulate(simulator, HELD_OUT, 1)
    estimator, random = BUILDERS[kind]()(theta, x), torch.Generator().manual_seed(0)

    def loss() -> torch.Tensor:
        rows = torch.randint(simulations, (BATCH,), generator=random)
        return estimator.loss(theta[rows], condition=x[rows]).mean()

    def validate() -> float:
        return estimator.loss(held_out[0], condition=held_out[1]).mean().item()

    steps = fit(estimator, loss, seconds, RATE, validate)
    return NPE(prior(simulator), show_progress_bars=False).build_posterior(estimator.eval()), steps


def rows(simulator, kinds: list[str], simulations: int, seconds: float, observations: int, compared: int, drawn: int):
    """Return the rows of one simulator."""
    _, observed = simulate(simulator, observations, 2)
    random = torch.Generator().manual_seed(3)
    first, second = ([simulator.posterior(x, compared, random) for x in observed] for _ in range(2))

    def score(samples: list[torch.Tensor]) -> dict:
        values = [c2st(*pair).item() for pair in zip(first, samples)]
        return {"c2st": statistics.fmean(values), "c2st_per_observation": values}

    found = [{"case": f"{simulator.name}, reference", **score(second)}]
    for kind in kinds:
        posterior, steps = estimate(kind, simulator, simulations, seconds)
        torch.manual_seed(4)
        samples = [posterior.sample((compared,), x=x[None], show_progress_bars=False) for x in observed]
        start = time.process_time()
        posterior.sample((drawn,), x=observed[:1], show_progress_bars=False)
        used = time.process_time() - start
        count = sum(p.numel() for p in posterior.posterior_estimator.parameters())
        head = {"case": f"{simulator.name}, {kind}", "steps": steps, "parameters": count, "sampling_seconds": used}
        found.append(head | score(samples))
        print(json.dumps(found[-1]), flush=True)
    return found


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--simulators", nargs="+", choices=SIMULATORS, default=list(SIMULATORS))
    parser.add_argument("--estimators", nargs="+", choices=BUILDERS, default=list(BUILDERS))
    parser.add_argument("--simulations", type=int, default=10_000, help="simulations to train on")
    parser.add_argument("--seconds", type=float, default=100, help="CPU time of the training of each estimator")
    parser.add_argument("--observations", type=int, default=5, help="observations whose posteriors are compared")
    parser.add_argument("--compared", type=int, default=1000, help="samples of each posterior that are compared")
    parser.add_argument("--drawn", type=int, default=10_000, help="samples of a posterior whose drawing is timed")


def results(args: argparse.Namespace) -> dict:
    sizes = args.simulations, args.seconds, args.observations, args.compared, args.drawn
    table = [row for name in args.simulators for row in rows(SIMULATORS[name], args.estimators, *sizes)]
    names = ("simulations", "seconds", "observations", "compared", "drawn")
    settings = {name: getattr(args, name) for name in names}
    return {"machine": {"sbi": sbi.__version__}, "settings": settings, "rows": table}


main = benchmark(__doc__, results, options, threads=1)


if __name__ == "__main__":
    main()
