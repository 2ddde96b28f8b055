"""Sampling on the CPU against the strongest peers: same weights, same noise, one process.

    python -m benchmarks.cpu.sampling --peer DIR --json benchmarks/results/sampling_cpu.json
    python -m benchmarks tables    # into README.md and docs/

`DIR` holds transformer_flow.py of github.com/apple/ml-tarflow, which is not part of this repository. The peers are its
loop ("released"), a plain KV cache sliced to the prefix ("plain"), that with its step under torch.compile ("compiled"),
and ONNX Runtime with the step as a graph ("onnxruntime"). Every time stands beside its floor, the larger of bytes /
read bandwidth of that working set and operations / peak, measured in the same run, and beside the error against
float64. With `--cases`, a results file keeps its rows of the other cases.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from starflow_kernels import stack_inverse
from starflow_kernels.accelerate.upstream.structure import read

from ..command import benchmark
from ..machine import peak_flops, read_bandwidth
from ..peers.released import load_peer, timed
from ..peers.sliced_cache import compiled_inverse, sliced_inverse

PEERS = ("released", "plain", "compiled", "onnxruntime")


@dataclasses.dataclass(frozen=True)
class Case:
    """Blocks of `layers` layers of width `channels` on a square image, `batch` samples, guided or not.

    `checked` is the number of tokens that are compared with float64, 0 for all. For one block a part is enough, since
    it is causal; the reference takes many minutes there and is not timed.
    """

    name: str
    image: tuple[int, int]
    patch: int
    channels: int
    blocks: int
    layers: int
    batch: int
    guidance: float = 0.0
    dtype: torch.dtype = torch.float32
    repeats: int = 7
    checked: int = 0

    @property
    def rows(self) -> int:
        return self.batch * (2 if self.guidance else 1)


SMALL = {"image": (1, 8), "patch": 2, "channels": 64, "blocks": 4, "layers": 2}
RGB32 = {"image": (3, 32), "patch": 2, "channels": 128, "blocks": 4, "layers": 4}
AFHQ = {"image": (3, 256), "patch": 8, "channels": 768, "blocks": 1, "layers": 8, "repeats": 1}
CASES = [
    *(Case(f"8x8 images, 4 x 2 layers, batch {batch}", batch=batch, **SMALL) for batch in (1, 100, 1000)),
    *(Case(f"32x32 images, 4 x 4 layers, batch {batch}", batch=batch, **RGB32) for batch in (1, 16)),
    Case("AFHQ-256 block, batch 1", batch=1, **AFHQ),
    Case("AFHQ-256 block, batch 1, bfloat16 weights", batch=1, dtype=torch.bfloat16, **AFHQ),
    Case("AFHQ-256 block, batch 8, guidance", batch=8, guidance=1.5, checked=96, **AFHQ),
]


def make_peer(peer, case: Case):
    """Return the released model with random weights; guidance needs classes."""
    torch.manual_seed(0)
    channels, size = case.image
    classes = 10 if case.guidance else 0
    model = peer.Model(channels, size, case.patch, case.channels, case.blocks, case.layers, num_classes=classes).eval()
    for block in model.blocks:  # with larger parameters, guidance overflows
        torch.nn.init.normal_(block.proj_out.weight, std=0.002 if case.guidance else 0.02)
    return model


def ours(
    model, z: torch.Tensor, labels, case: Case, dtype: torch.dtype, backend: str | None = None, inverse=None
) -> Callable[[], torch.Tensor]:
    """Return a function that inverts all blocks with our op, or each with `inverse` of the arguments of a block."""
    blocks = []
    for index, block in enumerate(model.blocks):
        spec, weights, _ = read(block, flip=index % 2 == 1)
        spec, options = dataclasses.replace(spec, positions=z.shape[1]), {}
        weights["pos_embed"] = weights["pos_embed"][: z.shape[1]]
        if case.guidance:
            embed = block.class_embed.detach().squeeze(1)
            options["cond"] = torch.cat([embed[labels], embed.mean(0).expand(len(labels), -1)]).to(z.dtype)
            options["guidance"] = case.guidance
        # Rounded to the dtype of the case first, so that the error is of the arithmetic alone.
        weights = {name: weight.detach().to(case.dtype).to(dtype) for name, weight in weights.items()}
        blocks.append((weights, spec, options))

    def run() -> torch.Tensor:
        if inverse is None:
            return stack_inverse(z, blocks, backend=backend)[0].x
        x = z
        for weights, spec, options in reversed(blocks):
            x = inverse(x, weights, spec, **options)
        return x

    return run


def floor_seconds(model, case: Case) -> tuple[float, str]:
    """Return the floor of a token step, which reads all weights and on average half of the KV cache."""
    spec, *_ = read(model.blocks[0])
    shapes = [shape for shape in spec.weight_shapes.values() if len(shape) == 2 and shape[0] != spec.positions]
    products = sum(a * b for a, b in shapes)
    weight_bytes = products * torch.finfo(case.dtype).bits // 8
    cache_bytes = 2 * case.layers * case.rows * spec.positions * case.channels * 4 / 2
    bandwidth = read_bandwidth(int(weight_bytes + cache_bytes))
    by_bytes = (weight_bytes + cache_bytes) / bandwidth
    by_flops = 2 * case.rows * products / peak_flops()
    return max((by_bytes, f"bytes at {bandwidth / 1e9:.0f} GB/s"), (by_flops, f"{peak_flops() / 1e9:.0f} GFLOP/s"))


def peers(model, z: torch.Tensor, labels, case: Case) -> tuple[dict[str, Callable], dict[str, str]]:
    """Return the peers by name, and why others do not run."""

    def released() -> torch.Tensor:
        return model.patchify(model.reverse(z.clone(), labels, guidance=case.guidance))

    runs, left_out = {"released": released}, {}
    ways = {"plain": sliced_inverse, "compiled": compiled_inverse()}
    if case.dtype != torch.float32:
        left_out["onnxruntime"] = f"no products in {case.dtype} on a CPU"
    elif importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
        from ..peers.onnx_runtime import OnnxInverse

        ways["onnxruntime"] = OnnxInverse()
    else:
        left_out["onnxruntime"] = "needs the packages onnx and onnxruntime"
    if case.guidance:
        return runs, dict.fromkeys(PEERS[1:], "written without guidance")
    for name, inverse in ways.items():
        runs[name] = ours(model, z, labels, case, case.dtype, inverse=inverse)
    return runs, left_out


@torch.no_grad()
def measure(peer, case: Case) -> dict:
    """Return one row of the table, with times per token step."""
    # Graphs of other cases count toward the limit of recompilations.
    torch.compiler.reset()
    model = make_peer(peer, case)
    z = torch.randn(case.batch, model.num_patches, case.image[0] * case.patch**2)
    labels = torch.arange(case.batch) % 10 if case.guidance else None
    checked = case.checked or model.num_patches
    exact = ours(model, z[:, :checked].double(), labels, case, torch.float64, "reference")()
    others, left_out = peers(model, z, labels, case)
    runs = {"ours": ours(model, z, labels, case, case.dtype), **others}
    if not case.checked:
        runs["reference"] = ours(model, z, labels, case, case.dtype, "reference")
    floor_of_case = functools.partial(floor_seconds, model, case)
    steps = case.blocks * (model.num_patches - 1)
    # A first call compiles.
    found, times = {name: runs[name]() for name in ("ours", "compiled") if name in runs}, {name: [] for name in runs}
    # The speed of a shared machine moves within seconds, so methods take turns, each long enough to be warm, and the
    # better of two floors counts.
    before = floor_of_case()
    for _ in range(case.repeats):
        for name, run in runs.items():
            end = time.perf_counter() + 0.2
            for i in itertools.count():
                found[name], spent = timed(run)
                times[name].append(spent)
                if time.perf_counter() > end and i >= 2 * (name == "ours"):
                    break
    floor, bound = min(before, floor_of_case())
    seconds = {name: statistics.median(values) / steps for name, values in times.items()}
    if case.dtype != torch.float32:
        del found["released"]  # it runs other weights
    errors = {name: (result[:, :checked] - exact).abs().max().item() for name, result in found.items()}
    return {
        "case": case.name,
        "microseconds": {name: 1e6 * value for name, value in seconds.items()},
        "floor_microseconds": 1e6 * floor,
        "floor": bound,
        "of_floor": floor / seconds["ours"],
        **{f"ratio_{name}": value / seconds["ours"] for name, value in seconds.items() if name != "ours"},
        "error": errors,
        "left_out": left_out,
    }


def strongest(row: dict) -> str:
    """Return the name of the fastest peer of a row."""
    return min((name for name in PEERS if name in row["microseconds"]), key=row["microseconds"].get)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peer", type=Path, required=True, help="folder with the released transformer_flow.py")


def results(args: argparse.Namespace) -> dict:
    peer, rows = load_peer(args.peer), []
    for case in CASES:
        if case.name in args.cases:
            rows.append(measure(peer, case))
            print(rows[-1], flush=True)
    return {"rows": rows}


main = benchmark(__doc__, results, options, cases=[case.name for case in CASES])

if __name__ == "__main__":
    main()
