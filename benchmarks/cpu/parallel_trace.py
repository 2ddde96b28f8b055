"""Convergence of parallel inverses of a flow's blocks: a picture of the error after every pass.

    python -m benchmarks.cpu.parallel_trace CHECKPOINT --picture docs/img/parallel.png

The methods of benchmarks.cpu.parallel, in plain PyTorch and without an end at a tolerance; each block starts from its
exact
noise. The error is the worst of a batch against our sequential kernel. A method that works in modules has done with the
first tokens before it begins with the last. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from starflow.inversion.request import neighbours
from starflow_kernels.solve_inverse.quasi_newton import QuasiNewton

from ..command import benchmark
from ..peers.published import SEJD, STARFLOW, EagerBlock, Rule, gs_jacobi_rules, solve
from .parallel import Case, inputs_and_results, load

SMALLEST = 1e-7


@torch.no_grad()
def quasi_newton(
    block: EagerBlock, z: torch.Tensor, offsets: tuple[int, ...], passes: int, watch: Callable[[torch.Tensor], None]
) -> None:
    """Run sweeps over all tokens with the steps of our quasi-Newton iteration."""
    z = z.flip(1) if block.spec.flip else z
    x, first, tokens = z.clone(), block.first, slice(block.first, block.size)
    model, rows = QuasiNewton(offsets, z), torch.arange(len(z))
    for _ in range(passes):
        mu, log_sigma = block.moments(x, first, block.size)
        spread = log_sigma.exp() * z[:, tokens]
        x[:, tokens] = model.step(rows, tokens, x[:, tokens].clone(), mu + spread, log_sigma, spread)
        watch(x)


def traces(case: Case, passes: int) -> list[dict[str, list[float]]]:
    """Return max |x - exact| after every pass, by block and method."""
    noise, data = inputs_and_results(case)
    strategy = gs_jacobi_rules([case.eager(i) for i in range(len(data))], noise, data, rest=10)
    found = []
    for i, (z, x) in enumerate(zip(noise, data)):
        exact = x.flip(1) if case.blocks[i][1].flip else x
        rules = {
            "Jacobi from noise": dataclasses.replace(SEJD, guess="noise", bound=-1.0, limit=passes),
            "Jacobi from zero (SeJD: to 0.5)": dataclasses.replace(SEJD, bound=-1.0, limit=passes),
            "GS-Jacobi": strategy[i],
            "STARFlow rule": STARFLOW,
        }
        traced = {name: _errors(exact, case.eager(i), z, rule) for name, rule in rules.items()}
        errors: list[float] = []
        offsets = neighbours(case.flow.config.grid, 0)
        quasi_newton(case.eager(i), z, offsets, passes, lambda x, e=errors, s=exact: e.append(_error(x, s)))
        found.append({"quasi-Newton": errors, **traced})
    return found


def _errors(exact: torch.Tensor, block: EagerBlock, z: torch.Tensor, rule: Rule) -> list[float]:
    errors: list[float] = []
    solve(block, z, rule, lambda x: errors.append(_error(x, exact)))
    return errors


def _error(x: torch.Tensor, exact: torch.Tensor) -> float:
    return (x - exact).abs().max().item()


def draw(blocks: list[dict[str, list[float]]], title: str, path: Path) -> None:
    """Draw a panel per block, in the order in which blocks are sampled."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(4, len(blocks))
    rows = -(-len(blocks) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(3.4 * columns, 0.6 + 2.8 * rows), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, i in zip(axes.flat, reversed(range(len(blocks)))):
        for name, errors in blocks[i].items():
            style = {
                "linewidth": 2.4 if name == "quasi-Newton" else 1.2,
                "linestyle": "--" if name == "GS-Jacobi" else "-",
            }
            kept = [max(error, SMALLEST) for error in errors]
            axis.plot(range(1, len(kept) + 1), kept, label=name, **style)
        axis.axhline(1e-4, color="grey", linewidth=0.6, linestyle=":")
        axis.set(title=f"block {i}", xscale="log", yscale="log", ylim=(SMALLEST, 30), xlabel="passes")
    for axis in axes[:, 0]:
        axis.set_ylabel("max error")
    for axis in axes.flat[len(blocks) :]:
        axis.remove()
    figure.suptitle(title, fontsize=10)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9, frameon=False
    )
    figure.savefig(path, dpi=110)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="folder, or name of a bundled checkpoint")
    parser.add_argument("--picture", type=Path, required=True, help="PNG to write")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--passes", type=int, default=100, help="passes of the methods that work on all tokens")


def results(args: argparse.Namespace) -> dict:
    name, flow = load(args.checkpoint)
    case = Case(name, flow, args.batch)
    found = traces(case, min(args.passes, case.z.shape[1]))
    draw(found, f"{name}: error of {args.batch} samples against sequential, blocks as they are sampled", args.picture)
    return {"blocks": found}


main = benchmark(__doc__, results, options)


if __name__ == "__main__":
    main()
