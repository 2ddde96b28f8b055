"""Density pass and training step on the CPU against the released TarFlow: same weights, same images, one process.

    python -m benchmarks.cpu.density --peer DIR --json benchmarks/results/density_cpu.json

`DIR` holds transformer_flow.py of github.com/apple/ml-tarflow. The model is the 32x32x3 one of benchmarks.cpu.sampling.
The floor is operations / peak, measured in the same run; a training step does three times those of a density pass.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch

from starflow import Flow
from starflow_kernels.accelerate.upstream.structure import read

from ..command import benchmark
from ..machine import peak_flops
from ..peers.released import load_peer, timed
from ..training_step import CONFIG, own_loss, trainer


def make(peer):
    """Return the released model and ours with the same random weights."""
    torch.manual_seed(0)
    model, flow = peer.Model(3, 32, 2, 128, 4, 4), Flow(CONFIG)
    with torch.no_grad():
        for theirs, own in zip(model.blocks, flow.blocks, strict=True):
            torch.nn.init.normal_(theirs.proj_out.weight, std=0.02)
            _, weights, _ = read(theirs)
            for name, weight in own.weights().items():
                weight.copy_(weights[name])
    return model, flow


def released_loss(model, images):
    """Return the loss by the released code."""
    z, _, logdets = model(images)
    return model.get_loss(z, logdets)


def operations(batch: int) -> int:
    """Return the operations of one density pass: every product, and the causal half of the attention."""
    T, C, D = 256, 128, 12
    layer = 2 * T * 12 * C * C + 2 * T * T * C
    return batch * 4 * (4 * layer + 2 * T * (D + 2 * D) * C)


def measure(peer, batch: int, repeats: int) -> list[dict]:
    """Return the rows of the table: both passes of both codes, in turns."""
    model, flow = make(peer)
    images = torch.randn(batch, 3, 32, 32)
    codes = {"released": (model, released_loss), "ours": (flow, own_loss)}
    with torch.no_grad():
        exact = own_loss(make(peer)[1].double(), images.double()).item()
        errors = {name: abs(loss(module, images).item() - exact) for name, (module, loss) in codes.items()}

    def density(module, loss):
        def run() -> None:
            with torch.no_grad():
                loss(module, images)

        return run

    rows = []
    for case, passes, runs in (
        ("density pass", 1, {name: density(*code) for name, code in codes.items()}),
        ("training step", 3, {name: trainer(*code, images) for name, code in codes.items()}),
    ):
        for run in runs.values():
            run()
        seconds = {name: [] for name in runs}
        for _ in range(repeats):
            for name, run in runs.items():
                seconds[name].append(timed(run)[1])
        median = {name: statistics.median(values) for name, values in seconds.items()}
        floor = passes * operations(batch) / peak_flops()
        rows.append(
            {
                "case": f"32x32, {case}, batch {batch}",
                "milliseconds": {name: 1e3 * value for name, value in median.items()},
                "floor_milliseconds": 1e3 * floor,
                "of_floor": floor / median["ours"],
                "ratio_released": median["released"] / median["ours"],
                "error_of_loss": errors,
            }
        )
    return rows


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peer", type=Path, required=True, help="folder with the released transformer_flow.py")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)


def results(args: argparse.Namespace) -> dict:
    return {"rows": measure(load_peer(args.peer), args.batch, args.repeats)}


main = benchmark(__doc__, results, options)


if __name__ == "__main__":
    main()
