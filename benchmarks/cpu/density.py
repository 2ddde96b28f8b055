"""Density pass and training step on the CPU against the released TarFlow: same weights, same images.

    python -m benchmarks.cpu.density --peer DIR --json benchmarks/results/density_cpu.json

`DIR` holds transformer_flow.py of github.com/apple/ml-tarflow. The model is the 32x32x3 one of benchmarks.cpu.sampling.
The floor is operations / peak, measured in the same run; a training step does three times those of a density pass.
Times are those of one process that takes turns. Peak memory is measured in a process per code and pass.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch

from starflow import Flow
from starflow_kernels.accelerate.upstream.structure import read

from ..command import benchmark, in_fresh_process
from ..machine import peak_bytes, peak_flops, reset_peak
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


def density(module, loss, images):
    """Return a function that takes one density pass."""

    def run() -> None:
        with torch.no_grad():
            loss(module, images)

    return run


# Name -> maker of a function, and how many times the operations of a density pass it takes.
PASSES = {"density pass": (density, 1), "training step": (trainer, 3)}


def codes(peer) -> dict:
    """Return the model and the loss of both codes."""
    model, flow = make(peer)
    return {"released": (model, released_loss), "ours": (flow, own_loss)}


def memory(folder: Path, name: str, code: str, batch: int, threads: int) -> int:
    """Return the peak memory of a pass beyond that of images, model and loaded libraries, in this process."""
    torch.set_num_threads(threads)
    make_run, small = PASSES[name][0], torch.randn(1, 3, 32, 32)
    module, loss = codes(load_peer(folder))[code]
    # The first pass loads libraries and packs weights.
    density(module, loss, small)()
    images = torch.randn(batch, 3, 32, 32)
    before, run = reset_peak(), make_run(module, loss, images)
    for _ in range(2):
        run()
    return peak_bytes() - before


def measure(peer, batch: int, repeats: int) -> list[dict]:
    """Return the rows of the table: both passes of both codes, in turns."""
    both, images = codes(peer), torch.randn(batch, 3, 32, 32)
    with torch.no_grad():
        exact = own_loss(make(peer)[1].double(), images.double()).item()
        errors = {name: abs(loss(module, images).item() - exact) for name, (module, loss) in both.items()}
    rows = []
    for case, (make_run, passes) in PASSES.items():
        runs = {name: make_run(*code, images) for name, code in both.items()}
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
    rows = measure(load_peer(args.peer), args.batch, args.repeats)
    for row, name in zip(rows, PASSES, strict=True):
        row["megabytes"] = {
            code: in_fresh_process(memory, args.peer, name, code, args.batch, args.threads) / 1e6
            for code in row["milliseconds"]
        }
    return {"rows": rows}


main = benchmark(__doc__, results, options)


if __name__ == "__main__":
    main()
