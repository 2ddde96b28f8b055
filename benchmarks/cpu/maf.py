"""Inverse of a trained MAF of zuko: its own, with D passes per transform, against solve_inverse on the same network.

    pip install 'starflow-kernels[adapters,models]'
    python -m benchmarks.cpu.maf --json benchmarks/results/maf_cpu.json

Five transforms over the 64 pixels of scikit-learn's digits, uniform dequantisation, zuko's default hidden sizes. Passes
are counted by hooks on the networks. Errors are against zuko's inverse in float64 of the same noise; those of zuko in
float32 say how far rounding alone reaches. A result counts only where ours stays below the larger of 1e-6 and twice
zuko's own error.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable

import torch
import zuko

from starflow.data.datasets import DataConfig, dequantize, load
from starflow_kernels import Solver, solve_inverse

from ..command import benchmark
from ..peers.released import timed

D, TRANSFORMS, STEPS, BATCH = 64, 5, 3000, 256
# In float32, a smaller tolerance is below rounding.
TOLERANCES = {torch.float64: 5e-7, torch.float32: 1e-6}
# The pixels to the left and above. Half of the transforms run backwards, where these are right and below.
NEIGHBOURS = (1, 8)


def solvers(dtype: torch.dtype) -> dict[str, Solver]:
    """Settings of the comparison."""
    plain = Solver("jacobi", tol=TOLERANCES[dtype])
    return {
        "sequential": Solver(),
        "jacobi": plain,
        "quasi-Newton": dataclasses.replace(plain, neighbours=NEIGHBOURS),
    }


def train() -> tuple[zuko.flows.MAF, float]:
    """Return the flow, and the mean log density of held-out images in nats."""
    torch.manual_seed(0)
    parts = [torch.stack([part.fetch(i) for i in range(len(part))]).flatten(1) for part in load(DataConfig("digits"))]
    random = torch.Generator().manual_seed(0)
    flow = zuko.flows.MAF(D, transforms=TRANSFORMS)
    optimizer = torch.optim.AdamW(flow.parameters(), lr=1e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        rows = torch.randint(len(parts[0]), (BATCH,), generator=random)
        loss = -flow().log_prob(dequantize(parts[0][rows], 17, 0, random)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
        optimizer.step()
        schedule.step()
    flow.requires_grad_(False)
    return flow, flow().log_prob(dequantize(parts[1], 17, 0, random)).mean().item()


def conditioner(transform: zuko.flows.MaskedAutoregressiveTransform) -> Callable:
    """Return raw parameters [log sigma | mu], one scalar per token, from zuko's z = scale x + shift."""

    def raw(x: torch.Tensor) -> torch.Tensor:
        affine = transform.meta(None, x.squeeze(-1)).base
        return torch.stack([-affine.log_scale, -affine.shift / affine.scale], -1)

    return raw


def inverse(flow, z: torch.Tensor, solver: Solver) -> torch.Tensor:
    """Return x (N, D) for the noise z."""
    for transform in reversed(flow.transform.transforms):
        z = solve_inverse(conditioner(transform), z[..., None], order=transform.order.argsort(), solver=solver).x
        z = z.squeeze(-1)
    return z


def counted(flow, run: Callable) -> tuple[torch.Tensor, list[int]]:
    """Return the result of run(), and the passes of each transform's network in the order of sampling."""
    passes = [0] * TRANSFORMS

    def hook(i: int) -> Callable:
        def count(*_) -> None:
            passes[i] += 1

        return count

    handles = [t.hyper.register_forward_hook(hook(i)) for i, t in enumerate(flow.transform.transforms)]
    result = run()
    for handle in handles:
        handle.remove()
    return result, passes[::-1]


def measure(flow, dtype: torch.dtype, batch: int, repeats: int) -> list[dict]:
    """Return the rows of the table: every method on the same noise, in turns."""
    z = torch.randn(batch, D, generator=torch.Generator().manual_seed(batch))
    exact = flow.double()().transform.inv(z.double())
    flow, z = flow.to(dtype), z.to(dtype)
    runs = {"zuko": lambda: flow().transform.inv(z)}
    for name, solver in solvers(dtype).items():
        runs[name] = lambda solver=solver: inverse(flow, z, solver)
    results = {name: counted(flow, run) for name, run in runs.items()}
    seconds = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append(timed(run)[1])
    median = {name: statistics.median(values) for name, values in seconds.items()}
    errors = {name: (x - exact).abs().max().item() for name, (x, _) in results.items()}
    for name, error in errors.items():
        assert error <= max(1e-6, 2 * errors["zuko"]), f"{name}: error {error}"
    return [
        {
            "case": f"{str(dtype).removeprefix('torch.')}, {batch} samples, {name}",
            "passes": sum(passes),
            "passes_of_transforms": passes,
            "milliseconds": 1e3 * median[name],
            "ratio_zuko": median["zuko"] / median[name],
            "error": errors[name],
            "difference_zuko": (x - results["zuko"][0]).abs().max().item(),
        }
        for name, (x, passes) in results.items()
    ]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--repeats", type=int, default=5)


def results(args: argparse.Namespace) -> dict:
    (flow, nats), seconds = timed(train)
    print(f"trained in {seconds:.0f} s, held-out log-density {nats:.2f} nats")
    rows = [
        row
        for dtype in (torch.float64, torch.float32)
        for batch in args.batch
        for row in measure(flow, dtype, batch, args.repeats)
    ]
    tolerances = {str(dtype): tol for dtype, tol in TOLERANCES.items()}
    trained = {"seconds": seconds, "held_out_nats": nats, "tolerances": tolerances}
    return {"machine": {"zuko": zuko.__version__}, "trained": trained, "rows": rows}


main = benchmark(__doc__, results, options, threads=1)


if __name__ == "__main__":
    main()
