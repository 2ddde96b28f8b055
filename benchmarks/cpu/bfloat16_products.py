"""Sampling with products of bfloat16 values beside products of float32 values, on a CPU with avx512_bf16.

    python -m benchmarks.cpu.bfloat16_products --json benchmarks/results/bfloat16_products_cpu.json
    python -m benchmarks tables    # into docs/

The three ways take turns on the same noise: float32 weights, the same weights in bfloat16 with exact products, and
`quantize="bfloat16"`. Differences are those of the samples from the ones of float32 weights. The digits are those of
the bundled model; the other weights are random.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import torch

import starflow
from starflow_kernels import BlockSpec, stack_inverse

from ..command import benchmark

ROUNDS = 7
WAYS = ("float32", "bfloat16 weights", "bfloat16 products")
Blocks = list[tuple[dict[str, torch.Tensor], BlockSpec, dict]]


def digits(batch: int) -> Blocks:
    """Return the blocks of the bundled model of 8x8 digits, with all classes in turn."""
    classes = torch.nn.functional.one_hot(torch.arange(batch) % 10, 10).float()
    flow = starflow.open_model("digits")
    return [block.inverse_arguments(classes, None, (None, None), {}) for block in flow.blocks]


def random_blocks(batch: int, *, count: int, channels: int, layers: int, token_dim: int, tokens: int) -> Blocks:
    """Return blocks with random weights, every second one with flipped tokens."""
    torch.manual_seed(0)
    heads, blocks = channels // 64, []
    for index in range(count):
        spec = BlockSpec(
            token_dim=token_dim, channels=channels, layers=layers, heads=heads, head_dim=64, kv_heads=heads,
            mlp_dim=4 * channels, positions=tokens, flip=index % 2 == 1,
        )  # fmt: skip
        weights = {}
        for name, shape in spec.weight_shapes.items():
            scale = shape[-1] ** -0.5 if len(shape) == 2 else 0.02
            weights[name] = torch.randn(shape) * (0.1 * scale if name == "proj_out.weight" else scale)
            if name.endswith("norm.weight"):
                weights[name] += 1
        blocks.append((weights, spec, {}))
    return blocks


RGB32 = functools.partial(random_blocks, count=4, channels=128, layers=4, token_dim=12, tokens=256)
WIDE = functools.partial(random_blocks, count=1, channels=768, layers=8, token_dim=192, tokens=32)
KINDS: dict[str, tuple[Callable[[int], Blocks], tuple[int, ...]]] = {
    "digits": (digits, (1, 1000)),
    "32x32 images, 4 x 4 layers": (RGB32, (1, 16)),
    "768 channels, 8 layers, 32 tokens": (WIDE, (1, 16, 64)),
}
CASES = {f"{kind}, batch {batch}": (make, batch) for kind, (make, batches) in KINDS.items() for batch in batches}


@torch.no_grad()
def measure(name: str) -> dict:
    """Return one row of the table, with times per token step."""
    make, batch = CASES[name]
    blocks = make(batch)
    spec = blocks[0][1]
    z = torch.randn(batch, spec.positions, spec.token_dim, generator=torch.Generator().manual_seed(0))
    narrow = [({n: w.bfloat16() for n, w in weights.items()}, *rest) for weights, *rest in blocks]
    rounded = [(weights, spec, {**options, "quantize": "bfloat16"}) for weights, spec, options in blocks]
    runs = dict(zip(WAYS, (blocks, narrow, rounded)))
    steps = len(blocks) * (spec.positions - (0 if spec.start else 1))
    times, found = {way: [] for way in WAYS}, {}
    for _ in range(ROUNDS):
        for way, stack in runs.items():
            end = time.perf_counter() + 0.1
            while not times[way] or time.perf_counter() < end:
                start = time.perf_counter()
                found[way] = stack_inverse(z, stack, backend="native")[0].x
                times[way].append(time.perf_counter() - start)
    exact = found["float32"]
    differences = {way: (found[way] - exact).abs() for way in WAYS[1:]}
    return {
        "case": name,
        "microseconds": {way: 1e6 * statistics.median(values) / steps for way, values in times.items()},
        "difference": {way: {"max": d.max().item(), "mean": d.mean().item()} for way, d in differences.items()},
        "deviation": exact.std().item(),
    }


def results(args: argparse.Namespace) -> dict:
    rows = []
    for case in args.cases:
        rows.append(measure(case))
        print(rows[-1], flush=True)
    return {"rows": rows}


main = benchmark(__doc__, results, cases=list(CASES))

if __name__ == "__main__":
    main()
