"""Samples per second of a posterior of ten parameters: a TokenFlow, and MAF and NSF of zuko with two inverses.

    pip install 'starflow-kernels[adapters]'
    python -m benchmarks.cpu.posterior_sampling --json benchmarks/results/posterior_sampling_cpu.json

All flows are trained for the same CPU time on simulations of eight schools, as in `benchmarks.science.posteriors`.
Flows of zuko are inverted by zuko, and by `solve_inverse` with the same networks. Times are CPU times of one thread,
medians of runs in turns. Errors are against the inverse of the same noise in float64, by zuko or by our reference.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import time
from collections.abc import Callable

import torch
import zuko
from torch import nn

from starflow_kernels import AffineSpec, Solver, solve_inverse

from ..command import benchmark
from ..floor import Work, block_work
from ..machine import copy_bandwidth, peak_flops
from ..science.posteriors import FLOWS, SIMULATORS, Simulations, train

SIMULATOR = SIMULATORS["eight schools"]
SOLVERS = {"sequential": Solver(), "Jacobi": Solver("jacobi", tol=1e-6)}


def accelerated(flow: nn.Module, z: torch.Tensor, condition: torch.Tensor, solver: Solver) -> torch.Tensor:
    """Return x (N, F) of a flow of zuko with any univariate transform, by solve_inverse.

    In x = mu(x) + z, the parameter mu is that by which the inverse of the transform differs from the identity.
    """

    def mu(x: torch.Tensor, z: torch.Tensor, condition: torch.Tensor, transform: nn.Module) -> torch.Tensor:
        return (transform.meta(condition, x.squeeze(-1)).inv(z) - z)[..., None]

    for transform in reversed(flow.transform.transforms):
        conditioner, order = functools.partial(mu, transform=transform), transform.order.argsort()
        found = solve_inverse(
            conditioner, z[..., None], AffineSpec("unit"), order=order, solver=solver, context=(z, condition)
        )
        z = found.x.squeeze(-1)
    return z


def inverses(kind: str, flow: nn.Module, z: torch.Tensor, condition: torch.Tensor) -> dict[str, Callable]:
    """Return the ways to map noise to samples, by name; the first one is that of the package of the flow."""
    if kind == "TokenFlow":
        return {
            name: lambda solver=solver: flow.inverse(z, condition, solvers=solver).x for name, solver in SOLVERS.items()
        }
    own = flow.flow
    ways = {"zuko": lambda: own(condition).transform.inv(z)}
    for name, solver in SOLVERS.items():
        ways[f"solve_inverse, {name}"] = lambda solver=solver: accelerated(own, z, condition, solver)
    return ways


def exact(kind: str, flow: nn.Module, z: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    """Return samples in float64, by the plainest code."""
    flow, z, condition = copy.deepcopy(flow).double(), z.double(), condition.double()
    if kind == "TokenFlow":
        return flow.inverse(z, condition, backend="reference").x
    return flow.flow(condition).transform.inv(z)


def floor(flow: nn.Module, count: int) -> float:
    """Return the least seconds of a TokenFlow on one thread."""
    ceilings = {"float32_operations_a_second": peak_flops(), "bytes_a_second": copy_bandwidth(2**28)}
    tokens = flow.config.token_shape[0]
    works = [block_work(block.spec, count, tokens, weight_bytes=4, cache_bytes=4) for block in flow.blocks]
    return sum(works, Work(0, 0, 0)).seconds(ceilings, torch.float32)


@torch.no_grad()
def measure(flows: dict[str, nn.Module], condition: torch.Tensor, count: int, repeats: int) -> list[dict]:
    """Return a row per flow and inverse, all from the same noise and in turns."""
    z = torch.randn(count, SIMULATOR.parameters, generator=torch.Generator().manual_seed(5))
    condition = condition.expand(count, -1)
    runs, errors = {}, {}
    for kind, flow in flows.items():
        right = exact(kind, flow, z, condition)
        for name, run in inverses(kind, flow, z, condition).items():
            runs[kind, name], errors[kind, name] = run, (run() - right).abs().max().item()
    seconds = {key: [] for key in runs}
    for _ in range(repeats):
        for key, run in runs.items():
            start = time.process_time()
            run()
            seconds[key].append(time.process_time() - start)
    rows = []
    for (kind, name), values in seconds.items():
        median = statistics.median(values)
        rate = {"seconds": median, "samples_per_second": count / median, "error": errors[kind, name]}
        rows.append({"case": f"{kind}, {name}", "flow": kind, **rate})
    return rows


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=240, help="CPU time of the training of each flow")
    parser.add_argument("--simulations", type=int, default=50_000, help="simulations to train on")
    parser.add_argument("--tests", type=int, default=2000, help="simulations to test with")
    parser.add_argument("--count", type=int, default=10_000, help="samples of the posterior")
    parser.add_argument("--repeats", type=int, default=5)


def results(args: argparse.Namespace) -> dict:
    data = Simulations(SIMULATOR, args.simulations, 0)
    test = Simulations(SIMULATOR, args.tests, 2, data.scale)
    flows, nats = {}, {"exact posterior": SIMULATOR.log_posterior(test.y, test.x)}
    for kind in FLOWS:
        flows[kind], _ = train(kind, SIMULATOR, data, args.seconds, channels=64)
        with torch.no_grad():
            nats[kind] = flows[kind].log_prob(test.y, test.condition)
    likelihoods = {
        kind: {"nats": values.mean().item(), "error": values.std().item() / args.tests**0.5}
        for kind, values in nats.items()
    }
    rows = measure(flows, test.condition[0], args.count, args.repeats)
    settings = {name: getattr(args, name) for name in ("seconds", "simulations", "tests", "count")}
    return {
        "machine": {"zuko": zuko.__version__},
        "settings": settings,
        "held_out": likelihoods,
        "floor_seconds": floor(flows["TokenFlow"], args.count),
        "rows": rows,
    }


main = benchmark(__doc__, results, options, threads=1)


if __name__ == "__main__":
    main()
